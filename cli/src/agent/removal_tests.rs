//! Hosts that are gone for ever are taken out of the cluster: what that gives up, who must agree, and that they stay out.

use std::time::Duration;

use vmove_mirror::journal::Record;

use super::recovery_tests::{aftermath, moving, recovered};
use super::test_hosts::{Host, code, eventually, pair};
use super::{cluster, peers};
use crate::api::types::HostInfo;

#[tokio::test]
async fn a_dead_third_host_blocks_a_take_over_until_it_is_removed() {
    let (left, right) = aftermath(Some(&[moving()]), Some(true)).await;
    let mut right = right.knowing("third", "127.0.0.1:1");
    let to_right = right.serve().await;
    assert!(recovered(&to_right).await.take_over.is_none());
    let refused = to_right.take_over("web", "right").await.unwrap_err();
    assert!(code(&refused) == "conflict" && refused.to_string().contains("vmove host rm third"), "{refused}");
    let removal = to_right.removal_of("third").await.unwrap();
    assert_eq!((removal.blockers.len(), removal.unreachable.as_slice()), (0, ["left".to_owned()].as_slice()));
    assert!(removal.waiting.is_empty() && removal.given_up.is_empty(), "{removal:?}");
    to_right.remove_host("third").await.unwrap();
    assert_eq!(code(&to_right.remove_host("third").await.unwrap_err()), "not_found");
    // For ever.
    right.end().await;
    let to_right = right.serve().await;
    assert!(to_right.hosts().await.unwrap().iter().all(|host| host.name != "third"));
    assert!(recovered(&to_right).await.take_over.is_some());
    let _ = to_right.take_over("web", "right").await;
    let taken = right.vm("web").records().unwrap();
    assert!(matches!(taken.last(), Some(Record::TakenOver { .. })), "{taken:?}");
    right.end().await;
    drop(left);
}

#[tokio::test]
async fn a_removed_source_is_taken_over_from_and_stays_out() {
    let (mut left, mut right) = aftermath(Some(&[moving()]), Some(true)).await;
    let to_right = right.serve().await;
    let removal = to_right.removal_of("left").await.unwrap();
    assert!(removal.authority_lost, "left holds it: {removal:?}");
    let [tied] = removal.waiting.as_slice() else { panic!("{removal:?}") };
    assert_eq!((tied.vm.as_str(), tied.host.as_str()), ("web", "right"));
    assert!(tied.what.contains("vmove recover web --take-ownership"), "{tied:?}");
    to_right.remove_host("left").await.unwrap();
    let report = recovered(&to_right).await;
    assert!(
        report.unreachable[0].host == "left" && report.unreachable[0].error.contains("removed"),
        "{report:?}"
    );
    let offer = report.take_over.unwrap();
    assert!(!offer.risks.iter().any(|risk| risk.contains("knows nothing")), "{offer:?}");
    let _ = to_right.take_over("web", "right").await;
    assert_eq!(recovered(&to_right).await.owner.as_deref(), Some("right"));

    // It comes back all the same: nobody answers it, it makes itself known to nobody, and it starts nothing.
    let to_left = left.serve().await;
    let asked: Result<HostInfo, _> =
        left.agent().peers.call("right", hyper::Method::GET, "/v1/host", None::<&()>, peers::SHORT).await;
    let refused = asked.unwrap_err();
    assert!(
        refused.code == "forbidden" && refused.message.contains("was removed from the cluster"),
        "{refused}"
    );
    let started = eventually("not being settled right now", async || {
        to_left.start("web").await.err().filter(|error| code(error) != "busy")
    });
    assert_eq!(code(&started.await), "undecided");
    assert!(to_right.hosts().await.unwrap().iter().all(|host| host.name != "left"));
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn only_a_host_that_nobody_reaches_is_removed_and_its_name_is_used_up() {
    let (mut left, to_left, mut right, to_right) = pair().await;
    let third = Host::new("third");
    let address = left.config().listen;
    let join = async |host: &Host| {
        let token = cluster::issue_token(&left.state(), Duration::from_mins(1)).unwrap();
        cluster::join(&host.state(), host.config(), address, &token).await
    };
    join(&third).await.unwrap();
    assert_eq!(code(&to_left.remove_host("left").await.unwrap_err()), "conflict");
    assert_eq!(code(&to_left.remove_host("nosuch").await.unwrap_err()), "not_found");
    let alive = to_left.remove_host("right").await.unwrap_err();
    assert!(code(&alive) == "blocked" && format!("{alive:?}").contains("answers host left"), "{alive:?}");

    // What was on it is named from when it was last seen.
    to_right.create(&right.definition("web")).await.unwrap();
    assert_eq!(to_left.vms(true).await.unwrap().vms.len(), 1);
    right.end().await;
    let removal = to_left.removal_of("right").await.unwrap();
    assert_eq!((removal.given_up.as_slice(), removal.authority_lost), (["web".to_owned()].as_slice(), false));
    assert_eq!(removal.unreachable, ["third"]);
    to_left.remove_host("right").await.unwrap();
    let again = join(&Host::new("right")).await.unwrap_err();
    assert!(again.to_string().contains("was removed"), "{again}");

    // A host that was away hears of it when it is back, however well it knew it.
    let mut third = third.knowing("right", "127.0.0.1:1");
    let to_third = third.serve().await;
    eventually("it has heard", async || {
        let hosts = to_third.hosts().await.unwrap();
        hosts.iter().all(|host| host.name != "right").then_some(())
    })
    .await;
    third.end().await;
    left.end().await;
}
