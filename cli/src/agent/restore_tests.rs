//! Who may restore a VM, with several hosts and after failures. VM processes are stood in for by a script that fails, so a VM that is
//! restored ends at once and is as before.

use vmove_compute::checkpoint::Manifest;
use vmove_compute::checkpoint::manifest::{KERNEL, MANIFEST, RAM};
use vmove_compute::checkpoint::sums::FileSums;
use vmove_mirror::journal::{MoveId, Record};
use vmove_storage::{ImageFormat, ImageSpec};

use super::recovery_tests::{aftermath, moving};
use super::registry::RESTORING;
use super::test_hosts::{Host, code, definition, eventually, pair};
use crate::api::checkpoint::RestoreCheckpoint;
use crate::client::{Client, ClientError};

/// Puts checkpoint `one` of VM web into a host's datastore.
fn checkpoint(host: &Host) {
    let dir = host.image("fast", "x").ancestors().nth(2).unwrap().join(".checkpoints/web/one");
    std::fs::create_dir_all(&dir).unwrap();
    let vm = definition("web", "fast");
    let disk = Manifest::disk_file(0);
    vmove_storage::create(&dir.join(&disk), &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
    std::fs::File::create(dir.join(RAM)).unwrap().set_len(vm.memory_mib << 20).unwrap();
    std::fs::write(dir.join(KERNEL), super::test_hosts::KERNEL).unwrap();
    let sums = |file: &str| FileSums::of(&dir.join(file)).unwrap();
    let manifest = Manifest {
        name: "one".into(),
        vm,
        host: "left".into(),
        generation: 1,
        taken_at: 0,
        pause_us: 0,
        ram: sums(RAM),
        disks: vec![sums(&disk)],
        kernel: sums(KERNEL),
        initrd: None,
        state: vec![],
    };
    std::fs::write(dir.join(MANIFEST), manifest.encode().unwrap()).unwrap();
}

async fn refused(client: &Client, host: Option<&str>) -> ClientError {
    let request = RestoreCheckpoint { host: host.map(str::to_owned) };
    client.restore("web", "one", &request).await.unwrap_err()
}

#[tokio::test]
async fn an_aborted_source_is_not_restored_before_its_target_has_answered() {
    let (mut left, mut right) = aftermath(Some(&[moving()]), Some(true)).await;
    checkpoint(&left);
    let to_left = left.serve().await;
    let error = eventually("the move being aborted", async || {
        Some(refused(&to_left, None).await).filter(|error| error.to_string().contains("right"))
    })
    .await;
    assert_eq!(code(&error), "undecided", "{error}");
    let id = MoveId::new("m").unwrap();
    let records = left.vm("web").records().unwrap();
    assert_eq!(records.last(), Some(&Record::Aborted { move_id: id.clone() }), "no restore was begun");
    // The target lets go, and it comes as far as the process.
    right.serve().await;
    eventually("the target lets go", async || (!right.vm("web").path().exists()).then_some(())).await;
    let error = eventually("the VM not being asked about any more", async || {
        Some(refused(&to_left, None).await)
            .filter(|error| code(error) != "undecided" && code(error) != "busy")
    })
    .await;
    assert!(code(&error) == "vm_process" && error.to_string().contains("boom"), "{error}");
    left.end().await;
    right.end().await;
}

// Fetching a checkpoint writes to disk where it runs, which a runtime of one thread does not allow.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_hosts_at_most_one_restores_a_vm_that_is_nowhere() {
    let (mut left, to_left, mut right, to_right) = pair().await;
    checkpoint(&left);
    eventually("right is known at left", async || {
        to_left.hosts().await.unwrap().iter().any(|host| host.name == "right").then_some(())
    })
    .await;
    // Left is at it: right hears of that, and so would left of right.
    let at_it = left.agent().registry.reserve("web", RESTORING).unwrap();
    let error = refused(&to_right, Some("right")).await;
    assert!(code(&error) == "busy" && error.to_string().contains("host left"), "{error}");
    assert!(!right.vm("web").path().exists());
    drop(at_it);
    let error = refused(&to_right, Some("right")).await;
    assert!(code(&error) == "vm_process" && error.to_string().contains("boom"), "{error}");
    left.end().await;
    right.end().await;
}
