//! What an agent does by itself with what a crash has left. VM processes are stood in for by a script that fails, so a VM that is booted
//! is `failed`.

use hyper::Method;
use vmove_mirror::journal::{MoveId, Record, Standing};
use vmove_storage::{OwnerState, Stamp};

use super::error::ApiError;
use super::peers;
use super::recovery_tests::aftermath;
use super::test_hosts::{Host, code, eventually, pair};
use super::vmdir::disks_at;
use crate::api::types::*;

#[tokio::test]
async fn what_a_crash_left_is_settled_at_the_start() {
    let mut host = Host::new("left");
    std::fs::create_dir_all(host.state().join("vms")).unwrap();
    let id = MoveId::new("m").unwrap();
    let stamp = |vm: &str, generation, state| Some(Stamp { vm: vm.into(), generation, state });
    let owner = |vm: &str| Record::Owner { generation: 1, disks: host.disks(vm) };
    let moving = Record::Moving { move_id: id.clone(), to_host: Some("gone".into()), generation: 2 };
    let incoming = |vm: &str| Record::Incoming {
        move_id: id.clone(),
        from_host: "gone".into(),
        generation: 2,
        disks: host.disks(vm),
    };
    host.remains("source", stamp("source", 1, OwnerState::Owned), &[owner("source"), moving.clone()]);
    host.remains("arriving", stamp("arriving", 2, OwnerState::Incoming), &[incoming("arriving")]);
    let prepared = Record::Prepared { move_id: id.clone() };
    host.remains("prepared", stamp("prepared", 2, OwnerState::Incoming), &[incoming("prepared"), prepared]);
    host.remains("half-made", stamp("half-made", 1, OwnerState::Incoming), &[]);
    let committed = Record::Committed { move_id: id.clone() };
    let left = [owner("left"), moving, committed];
    host.remains("left", stamp("left", 1, OwnerState::Owned), &left);
    // Its disk has changed datastore; the crash came before the old image was removed.
    let old = host.image("bulk", "pivoted");
    std::fs::create_dir_all(old.parent().unwrap()).unwrap();
    std::fs::write(&old, b"x").unwrap();
    stamp("pivoted", 1, OwnerState::Owned).unwrap().write(&old).unwrap();
    let was = DiskPlacement { name: "vda".into(), datastore: "bulk".into(), path: old.clone() };
    let pivoted = [
        Record::Owner { generation: 1, disks: disks_at(&[was]).unwrap() },
        Record::Moving { move_id: id.clone(), to_host: None, generation: 2 },
        Record::Owner { generation: 2, disks: host.disks("pivoted") },
    ];
    host.remains("pivoted", stamp("pivoted", 2, OwnerState::Owned), &pivoted);
    let client = host.serve().await;

    eventually("the arrival and the half-made VM are gone", async || {
        let gone = |vm: &str| !host.vm(vm).path().exists() && !host.image("fast", vm).exists();
        (gone("arriving") && gone("half-made")).then_some(())
    })
    .await;
    let source = eventually("the source is aborted", async || {
        let journal = host.vm("source").journal().unwrap();
        matches!(journal.standing(), Standing::Owner { .. }).then_some(())
    });
    source.await;
    assert_eq!(client.vm("source").await.unwrap().summary.state, VmState::Stopped);
    assert!(host.image("fast", "source").exists());
    eventually("the old image is gone", async || (!old.parent().unwrap().exists()).then_some(())).await;
    assert!(host.image("fast", "pivoted").exists());
    // Nobody can be asked: neither runs, neither is removed, and both say so.
    for vm in ["prepared", "left"] {
        assert_eq!(client.vm(vm).await.unwrap().summary.state, VmState::Undecided);
        let refused = eventually("not being settled right now", async || {
            client.start(vm).await.err().filter(|error| code(error) != "busy")
        });
        assert_eq!(code(&refused.await), "undecided");
        assert!(host.image("fast", vm).exists());
    }
    host.end().await;
}

#[tokio::test]
async fn both_dead_before_the_commit_the_source_has_it() {
    let id = MoveId::new("m").unwrap();
    let moving = Record::Moving { move_id: id.clone(), to_host: Some("right".into()), generation: 2 };
    let (mut left, mut right) = aftermath(Some(&[moving]), Some(true)).await;
    right.serve().await;
    let to_left = left.serve().await;
    eventually("the target discards", async || {
        (!right.vm("web").path().exists() && !right.image("fast", "web").exists()).then_some(())
    })
    .await;
    // That the target let go may be there, too.
    assert!(left.vm("web").records().unwrap().contains(&Record::Aborted { move_id: id }));
    assert_eq!(to_left.vm("web").await.unwrap().summary.state, VmState::Stopped);
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn both_dead_after_the_commit_the_target_has_it() {
    let id = MoveId::new("m").unwrap();
    let moving = Record::Moving { move_id: id.clone(), to_host: Some("right".into()), generation: 2 };
    let committed = Record::Committed { move_id: id };
    let (mut left, mut right) = aftermath(Some(&[moving, committed]), Some(true)).await;
    let to_right = right.serve().await;
    let to_left = left.serve().await;
    // It owns and tries to boot; the stand-in for the VM process fails, which makes it failed, not lost.
    let there = eventually("the target owns", async || {
        let there = to_right.vm("web").await.ok()?;
        (there.summary.state == VmState::Failed).then_some(there)
    })
    .await;
    assert_eq!((there.summary.host.as_str(), there.summary.generation), ("right", 2));
    assert_eq!(Stamp::read(&right.image("fast", "web")).unwrap().unwrap().state, OwnerState::Owned);
    eventually("the source lets go", async || {
        (!left.vm("web").path().exists() && !left.image("fast", "web").exists()).then_some(())
    })
    .await;
    assert_eq!(to_left.vm("web").await.unwrap().summary.host, "right");
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn a_source_lets_go_when_the_vm_has_gone_on_to_a_third_host() {
    let (mut left, _, mut right, to_right) = pair().await;
    left.end().await;
    let id = MoveId::new("m").unwrap();
    let stamp = |generation| Some(Stamp { vm: "web".into(), generation, state: OwnerState::Owned });
    let records = [
        Record::Owner { generation: 1, disks: left.disks("web") },
        Record::Moving { move_id: id.clone(), to_host: Some("gone".into()), generation: 2 },
        Record::Committed { move_id: id },
    ];
    left.remains("web", stamp(1), &records);
    right.remains("web", stamp(3), &[Record::Owner { generation: 3, disks: right.disks("web") }]);
    left.serve().await;
    eventually("the source lets go", async || {
        (!left.vm("web").path().exists() && !left.image("fast", "web").exists()).then_some(())
    })
    .await;
    assert_eq!(to_right.vm("web").await.unwrap().summary.generation, 3);
    assert!(right.image("fast", "web").exists());
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn only_the_target_of_a_move_that_is_under_way_may_ask_how_it_went() {
    let (mut left, _, mut right, _) = pair().await;
    let id = MoveId::new("m").unwrap();
    let ask = async |path: &str| -> Result<VerdictAnswer, ApiError> {
        left.agent().peers.call("right", Method::GET, path, None::<&()>, peers::LONG).await
    };
    for to_host in [Some("third".to_owned()), None] {
        let name = to_host.as_deref().unwrap_or("nowhere");
        let records = [
            Record::Owner { generation: 1, disks: right.disks(name) },
            Record::Moving { move_id: id.clone(), to_host: to_host.clone(), generation: 2 },
        ];
        let vm = right.remains(name, None, &records);
        let verdict = |id: &str| format!("/v1/vms/{name}/moves/{id}/verdict");
        let refused = ask(&verdict("m")).await.unwrap_err();
        assert_eq!(refused.code, "forbidden");
        assert_eq!(vm.records().unwrap(), records);
        // The word on an earlier move is nobody's secret.
        let earlier = ask(&verdict("l")).await.unwrap();
        assert_eq!(earlier.verdict, Verdict::Unknown);
    }
    left.end().await;
    right.end().await;
}

/// Its disk was full, so nobody could journal that the move is off; the only report of it was emptied by a power cut.
#[tokio::test]
async fn a_removed_vm_keeps_the_word_on_a_move_that_was_never_journalled_as_aborted() {
    let (mut left, _, mut right, _) = pair().await;
    let id = MoveId::new("m").unwrap();
    let moving = Record::Moving { move_id: id, to_host: Some("right".into()), generation: 2 };
    // Behind the agent's back: it settles nothing before it is restarted.
    let vm = left.remains("web", None, &[Record::Owner { generation: 1, disks: left.disks("web") }, moving]);
    let report = |dir: &std::path::Path| dir.join("m.json");
    std::fs::create_dir_all(vm.moves()).unwrap();
    std::fs::write(report(&vm.moves()), "").unwrap();
    left.agent().archive_moves(&vm).unwrap();
    std::fs::remove_dir_all(vm.path()).unwrap();
    assert_eq!(left.agent().verdict("right", "web", "m").await.unwrap(), Verdict::Aborted);

    // A word that is there is not replaced by what says nothing.
    let vm = left.remains("web", None, &[Record::Owner { generation: 1, disks: left.disks("web") }]);
    std::fs::create_dir_all(vm.moves()).unwrap();
    std::fs::write(report(&vm.moves()), "").unwrap();
    left.agent().archive_moves(&vm).unwrap();
    assert!(std::fs::metadata(report(&left.agent().archive_dir().unwrap())).unwrap().len() > 0);
    left.end().await;
    right.end().await;
}
