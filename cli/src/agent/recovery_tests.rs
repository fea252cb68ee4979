//! What two agents settle between them after a failure, and what only a person may decide. Left is the source of move `m`, right its
//! target; only their journals and images know of it. VM processes are stood in for by a script that fails, so a VM that is booted is
//! `failed`.

use vmove_mirror::journal::{MoveId, Record, Standing, TAKE_OVER_STEP};
use vmove_storage::{OwnerState, Stamp};

use super::test_hosts::{Host, code, eventually, pair};
use crate::api::recovery::{RecoveryReport, StandingKind};
use crate::api::types::VmState;
use crate::client::Client;

fn id() -> MoveId {
    MoveId::new("m").unwrap()
}

fn stamp(generation: u64, state: OwnerState) -> Option<Stamp> {
    Some(Stamp { vm: "web".into(), generation, state })
}

pub(super) fn moving() -> Record {
    Record::Moving { move_id: id(), to_host: Some("right".into()), generation: 2 }
}

fn aborted() -> Record {
    Record::Aborted { move_id: id() }
}

/// Both hosts, neither of them up. Without `records` the source has no trace of the VM.
pub(super) async fn aftermath(source: Option<&[Record]>, target: Option<bool>) -> (Host, Host) {
    let (mut left, _, mut right, _) = pair().await;
    left.end().await;
    right.end().await;
    if let Some(more) = source {
        let mut records = vec![Record::Owner { generation: 1, disks: left.disks("web") }];
        records.extend_from_slice(more);
        left.remains("web", stamp(1, OwnerState::Owned), &records);
    }
    if let Some(prepared) = target {
        let disks = right.disks("web");
        let mut records =
            vec![Record::Incoming { move_id: id(), from_host: "left".into(), generation: 2, disks }];
        if prepared {
            records.push(Record::Prepared { move_id: id() });
        }
        right.remains("web", stamp(2, OwnerState::Incoming), &records);
    }
    (left, right)
}

fn kinds(report: &RecoveryReport) -> Vec<(&str, StandingKind)> {
    report.hosts.iter().map(|held| (held.host.as_str(), held.standing)).collect()
}

pub(super) async fn recovered(client: &Client) -> RecoveryReport {
    client.recover("web").await.unwrap()
}

#[tokio::test]
async fn a_copy_is_kept_when_its_source_has_lost_its_journal() {
    let (mut left, mut right) = aftermath(None, Some(true)).await;
    let to_left = left.serve().await;
    let to_right = right.serve().await;
    for _ in 0..2 {
        let report = recovered(&to_right).await;
        assert!(!report.settled && report.owner.is_none(), "{report:?}");
        assert_eq!(kinds(&report), [("right", StandingKind::Prepared)]);
        assert_eq!(report.hosts[0].waits_for.as_deref(), Some("left"));
        assert!(report.hosts[0].images[0].allocated_bytes.is_some());
    }
    assert!(right.image("fast", "web").exists(), "the only copy there is");
    // The source answers, and can never say more: so it may be decided.
    let offer = recovered(&to_left).await.take_over.unwrap();
    assert_eq!((offer.host.as_str(), offer.instead_of.as_str()), ("right", "left"));
    assert!(offer.risks.iter().any(|risk| risk.contains("knows nothing of this move")), "{offer:?}");
    // Booting fails here; the VM is owned all the same. Asked of the other agent.
    let _ = to_left.take_over("web", "right").await;
    let report = recovered(&to_left).await;
    assert!(report.settled, "{report:?}");
    assert_eq!(report.owner.as_deref(), Some("right"));
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn a_source_that_comes_back_after_a_take_over_never_starts() {
    for records in [vec![moving()], vec![moving(), aborted()]] {
        let (mut left, mut right) = aftermath(Some(&records), Some(true)).await;
        let to_right = right.serve().await;
        let report = recovered(&to_right).await;
        assert_eq!(report.unreachable[0].host, "left");
        assert!(!report.settled && report.summary.contains("only that host knows"), "{}", report.summary);
        let offer = report.take_over.unwrap();
        assert!(offer.risks[0].contains("two hosts"), "{offer:?}");
        let _ = to_right.take_over("web", "right").await;
        let generation = 2 + TAKE_OVER_STEP;
        let taken = right.vm("web").records().unwrap();
        assert!(matches!(taken.last(), Some(Record::TakenOver { generation: at, .. }) if *at == generation));
        let there = eventually("it was booted", async || {
            to_right.vm("web").await.ok().filter(|vm| vm.summary.state == VmState::Failed)
        });
        assert_eq!(there.await.summary.generation, generation);
        assert_eq!(Stamp::read(&right.image("fast", "web")).unwrap(), stamp(generation, OwnerState::Owned));

        // Whatever the source had on its disk when it went, it learns of it before it starts anything.
        let to_left = left.serve().await;
        let started = to_left.start("web").await.unwrap_err();
        assert!(["undecided", "vm_process"].contains(&code(&started)), "{started}");
        let lost = eventually("the source knows", async || {
            matches!(left.vm("web").journal().unwrap().standing(), Standing::Lost { .. }).then_some(())
        });
        lost.await;
        let report = recovered(&to_left).await;
        assert_eq!(kinds(&report), [("left", StandingKind::Lost), ("right", StandingKind::Owner)]);
        assert!(report.settled && report.owner.as_deref() == Some("right"), "{report:?}");
        assert!(left.image("fast", "web").exists(), "what its guest wrote since is nowhere else");
        // Also with the other host gone again: the journal knows it now.
        right.end().await;
        assert_eq!(code(&to_left.start("web").await.unwrap_err()), "undecided");
        assert_eq!(code(&to_left.remove("web").await.unwrap_err()), "undecided");
        assert_eq!(code(&to_left.take_over("web", "left").await.unwrap_err()), "conflict");
        // It goes by an explicit act.
        to_left.discard_lost("web", "left").await.unwrap();
        assert!(!left.image("fast", "web").exists() && !left.vm("web").path().exists());
        left.end().await;
    }
}

#[tokio::test]
async fn an_aborted_source_is_not_started_before_its_target_has_answered() {
    let (mut left, mut right) = aftermath(Some(&[moving()]), Some(true)).await;
    let to_left = left.serve().await;
    let refused = eventually("the move being aborted", async || {
        to_left.start("web").await.err().filter(|error| error.to_string().contains("right"))
    });
    let refused = refused.await;
    assert_eq!(code(&refused), "undecided", "{refused}");
    assert!(refused.to_string().contains("vmove recover web"), "{refused}");
    let report = recovered(&to_left).await;
    assert!(!report.settled && report.summary.contains("may have been taken over"), "{}", report.summary);
    // The target comes back, hears of the abort, and lets go; nobody has to ask for it.
    right.serve().await;
    eventually("the target lets go", async || (!right.vm("web").path().exists()).then_some(())).await;
    let report = recovered(&to_left).await;
    assert!(report.settled && report.owner.as_deref() == Some("left"), "{report:?}");
    assert_eq!(left.vm("web").records().unwrap().last(), Some(&Record::Cleared { move_id: id() }));
    right.end().await;
    // Cleared is cleared: it starts (and fails, as all do here) with the target out of reach again.
    assert_eq!(code(&to_left.start("web").await.unwrap_err()), "vm_process");
    left.end().await;
}

#[tokio::test]
async fn an_aborted_source_can_be_started_by_an_operators_word() {
    let (mut left, mut right) = aftermath(Some(&[moving(), aborted()]), Some(true)).await;
    let to_left = left.serve().await;
    let report = recovered(&to_left).await;
    let offer = report.take_over.unwrap();
    assert_eq!((offer.host.as_str(), offer.instead_of.as_str()), ("left", "right"));
    let held = to_left.take_over("web", "left").await.unwrap();
    assert_eq!((held.standing, held.generation), (StandingKind::Owner, Some(1 + TAKE_OVER_STEP)));
    assert!(recovered(&to_left).await.settled);
    assert_eq!(code(&to_left.start("web").await.unwrap_err()), "vm_process");
    // A prepared target that comes back still hears the truth.
    right.serve().await;
    eventually("the target lets go", async || (!right.vm("web").path().exists()).then_some(())).await;
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn recover_settles_at_once_and_takes_nothing_over_that_is_decided() {
    // Neither is up when the other one asks first, so both would wait before they ask again.
    let (mut left, mut right) = aftermath(Some(&[moving()]), Some(true)).await;
    let to_right = right.serve().await;
    let to_left = left.serve().await;
    let report = recovered(&to_right).await;
    assert!(report.settled && report.take_over.is_none(), "{report:?}");
    assert_eq!(kinds(&report), [("left", StandingKind::Owner)]);
    for host in ["left", "right"] {
        let refused = to_left.take_over("web", host).await.unwrap_err();
        assert_eq!(code(&refused), "conflict", "{refused}");
    }
    assert_eq!(code(&to_left.discard_lost("web", "left").await.unwrap_err()), "conflict");
    assert_eq!(code(&to_left.recover("ghost").await.unwrap_err()), "not_found");
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn a_source_that_has_committed_is_not_taken_over() {
    let committed = [moving(), Record::Committed { move_id: id() }];
    let (mut left, right) = aftermath(Some(&committed), None).await;
    let to_left = left.serve().await;
    let report = recovered(&to_left).await;
    assert!(!report.settled && report.take_over.is_none(), "{report:?}");
    assert_eq!(kinds(&report), [("left", StandingKind::Left)]);
    let refused = to_left.take_over("web", "left").await.unwrap_err();
    assert!(refused.to_string().contains("complete as of the move"), "{refused}");
    left.end().await;
    drop(right);
}

#[tokio::test]
async fn a_removed_vm_still_answers_for_its_aborted_moves() {
    let (mut left, mut right) = aftermath(Some(&[moving()]), Some(true)).await;
    let to_left = left.serve().await;
    eventually("the move being aborted and the VM removed", async || to_left.remove("web").await.ok()).await;
    right.serve().await;
    eventually("the target lets go", async || (!right.vm("web").path().exists()).then_some(())).await;
    left.end().await;
    right.end().await;
}

/// Its process died with the record on disk and before it left a report; the VM was started by its user's word, and has gone on.
#[tokio::test]
async fn a_vm_that_has_gone_on_still_answers_for_a_move_that_left_no_report() {
    let generation = 1 + TAKE_OVER_STEP;
    let (mut left, mut right) = aftermath(Some(&[moving(), aborted()]), Some(true)).await;
    let taken = Record::TakenOver { move_id: id(), generation, disks: left.disks("web") };
    left.vm("web").append(&taken).unwrap();
    let to_left = left.serve().await;
    eventually("the VM being removed", async || to_left.remove("web").await.ok()).await;
    right.serve().await;
    eventually("the target lets go", async || (!right.vm("web").path().exists()).then_some(())).await;
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn a_take_over_is_remembered_when_the_vm_has_gone_on() {
    let (mut left, mut right) = aftermath(Some(&[moving(), aborted()]), Some(true)).await;
    let to_right = right.serve().await;
    let _ = to_right.take_over("web", "right").await;
    // Gone from there: moved on, or removed as here.
    eventually("it is removed", async || to_right.remove("web").await.ok()).await;
    assert!(!right.vm("web").path().exists());
    left.serve().await;
    let lost = eventually("the source knows", async || {
        matches!(left.vm("web").journal().unwrap().standing(), Standing::Lost { generation, .. }
            if *generation == 2 + TAKE_OVER_STEP)
        .then_some(())
    });
    lost.await;
    left.end().await;
    right.end().await;
}

/// A datastore-only move was aborted, and whoever did that died before it removed the images that were to be.
#[tokio::test]
async fn what_an_aborted_move_made_is_removed_however_the_abort_was_cut_short() {
    let local = Record::Moving { move_id: id(), to_host: None, generation: 2 };
    let (mut left, right) = aftermath(Some(&[local, aborted()]), None).await;
    let (old, made) = (left.image("fast", "web"), left.image("bulk", "web"));
    std::fs::create_dir_all(made.parent().unwrap()).unwrap();
    std::fs::copy(&old, &made).unwrap();
    stamp(2, OwnerState::Incoming).unwrap().write(&made).unwrap();
    let to_left = left.serve().await;
    // Settled or not yet: a start settles first.
    assert_eq!(code(&to_left.start("web").await.unwrap_err()), "vm_process");
    assert!(
        !made.exists(),
        "nobody else would ever remove it, and the next move there would be refused for it"
    );
    assert!(old.exists());
    left.end().await;
    drop(right);
}

/// It has gone on from where it was taken over, and what is left of it there is not removed yet.
#[tokio::test]
async fn a_take_over_is_remembered_while_the_vm_leaves() {
    let (left, mut right) = aftermath(None, None).await;
    right.serve().await;
    let generation = 2 + TAKE_OVER_STEP;
    let onward = MoveId::new("onward").unwrap();
    let (disks, to_host) = (right.disks("web"), Some("third".to_owned()));
    // Behind the agent's back: it settles nothing before it is restarted.
    let incoming =
        Record::Incoming { move_id: id(), from_host: "left".into(), generation: 2, disks: disks.clone() };
    let records = [
        incoming,
        Record::Prepared { move_id: id() },
        Record::TakenOver { move_id: id(), generation, disks },
        Record::Moving { move_id: onward.clone(), to_host, generation: generation + 1 },
        Record::Committed { move_id: onward.clone() },
        Record::Released { move_id: onward },
    ];
    right.remains("web", None, &records);
    let account = right.agent().standing("web", Some(id())).await.unwrap();
    assert_eq!((account.standing, account.generation), (StandingKind::Released, Some(generation)));
    let other = MoveId::new("other").unwrap();
    let account = right.agent().standing("web", Some(other)).await.unwrap();
    assert_eq!((account.standing, account.generation), (StandingKind::Released, None));
    right.end().await;
    drop(left);
}

#[tokio::test]
async fn nothing_is_taken_over_while_a_third_host_cannot_be_asked() {
    let (mut left, right) = aftermath(Some(&[moving()]), Some(true)).await;
    // The source is down, and so is a host that it may have moved the VM to.
    let mut right = right.knowing("third", "127.0.0.1:9");
    let to_right = right.serve().await;
    let report = recovered(&to_right).await;
    assert!(!report.settled && report.take_over.is_none(), "{report:?}");
    let refused = to_right.take_over("web", "right").await.unwrap_err();
    assert!(code(&refused) == "conflict" && refused.to_string().contains("third"), "{refused}");
    left.serve().await;
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn nothing_is_taken_over_where_an_image_is_missing() {
    let (_left, mut right) = aftermath(None, Some(true)).await;
    std::fs::remove_file(right.image("fast", "web")).unwrap();
    let to_right = right.serve().await;
    let report = recovered(&to_right).await;
    assert_eq!(kinds(&report), [("right", StandingKind::Prepared)]);
    assert_eq!(report.hosts[0].images[0].allocated_bytes, None);
    assert_eq!(report.take_over, None, "nobody is offered what cannot run");
    let refused = to_right.take_over("web", "right").await.unwrap_err();
    assert!(refused.to_string().contains("a disk that is not there"), "{refused}");
    assert_eq!(kinds(&recovered(&to_right).await), [("right", StandingKind::Prepared)]);
}
