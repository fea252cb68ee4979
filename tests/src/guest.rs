//! VMs of the fixture guest: made, started, moved, and where they run.

use std::fs;
use std::path::PathBuf;

use vmove::api::types::{MoveAccepted, MoveReport, VmDetail, VmState};

use crate::cluster::{Answer, Cluster};
use crate::console::Console;
use crate::wait::{until, until_ok};

/// Name of the VM where there is only one.
pub const VM: &str = "vm";
/// Name of its disk.
pub const DISK: &str = "vda";

/// A VM to be made.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// Virtual size of the disk, MiB.
    pub disk_mib: u64,
    /// Words for the guest.
    pub words: String,
}

impl Default for Spec {
    /// Small, with a steady load on RAM and disk, and heartbeats and flushes often enough to wait for.
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 64,
            disk_mib: 128,
            words: "vmove.fill_mib=32 vmove.ram_mib=8 vmove.ram_rate=500 vmove.disk_mib=16 vmove.disk_rate=200 vmove.flush_ms=100 \
                    vmove.heartbeat_ms=100"
                .to_owned(),
        }
    }
}

impl Cluster {
    /// The fixture guest as a file.
    pub fn kernel(&self) -> String {
        let path = self.path().join("guest.elf");
        fs::write(&path, vmove_guest_image::GUEST_ELF).unwrap();
        path.display().to_string()
    }

    /// Makes a VM on a host; `more` are further words of `vmove create`.
    pub fn create(&self, host: &str, vm: &str, spec: &Spec, more: &[&str]) -> Answer {
        let disk = format!("name={DISK},size={}MiB", spec.disk_mib);
        let (vcpus, memory) = (spec.vcpus.to_string(), format!("{}MiB", spec.memory_mib));
        let cmdline = format!("vmove.cpus={} {}", spec.vcpus, spec.words);
        let mut words = vec!["create", vm, "--vcpus", &vcpus, "--memory", &memory, "--cmdline", &cmdline];
        let kernel = self.kernel();
        words.extend(["--kernel", &kernel]);
        if !more.contains(&"--disk") {
            words.extend(["--disk", &disk]);
        }
        words.extend(more);
        self.vmove(host, &words)
    }

    /// Makes and starts [`VM`] on a host; waits until it has filled RAM and disk and beats.
    pub fn boot(&self, host: &str, spec: &Spec) -> Console {
        self.create(host, VM, spec, &[]).ok();
        self.vmove(host, &["start", VM]).ok();
        let console = self.console(host);
        console.heartbeat_after(2);
        console
    }

    /// Attaches to the console of [`VM`] on a host.
    pub fn console(&self, host: &str) -> Console {
        Console::attach(&self.host(host).vm_dir(VM).join("console.sock"))
    }

    /// What the agent of a host knows of [`VM`], wherever it is; none if nobody has it.
    pub fn show(&self, host: &str) -> Option<VmDetail> {
        let answer = self.vmove(host, &["show", VM, "--json"]);
        (answer.code == 0).then(|| answer.json())
    }

    /// Waits until [`VM`] is in a state on a host, and nobody is busy with it.
    pub fn until_state(&self, host: &str, state: VmState) -> VmDetail {
        until(&format!("{VM} being {state:?} on {host}"), || {
            self.show(host).filter(|vm| vm.summary.state == state && vm.summary.host == host)
        })
    }

    /// Waits until nothing of any VM is left on a host.
    pub fn until_clean(&self, host: &str) {
        until(&format!("nothing being left on {host} of {:?}", self.host(host).remains()), || {
            self.host(host).remains().is_empty().then_some(())
        });
    }

    /// Begins to move [`VM`]; gives the id of the move.
    pub fn begin_move(&self, host: &str, words: &[&str]) -> String {
        let accepted: MoveAccepted = self.vmove(host, &[&[VM, "--detach", "--json"], words].concat()).json();
        accepted.move_id
    }

    /// Moves [`VM`] and waits for the end; asserts that it completed and was verified.
    pub fn relocate(&self, host: &str, words: &[&str]) -> MoveReport {
        let report: MoveReport = self.vmove(host, &[&[VM, "--json"], words].concat()).json();
        assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
        assert!(!report.digest.is_empty(), "{report:?}");
        report
    }

    /// Starts [`VM`] once whoever looks after a crash lets it be.
    pub fn start_again(&self, host: &str) {
        let started = until_ok(|| {
            let answer = self.vmove(host, &["start", VM]);
            if answer.code == 0 { Ok(()) } else { Err(answer) }
        });
        started.unwrap_or_else(|answer| panic!("{VM} cannot be started again: {}", answer.stderr));
    }

    /// Stops [`VM`] and has QEMU look at its image.
    pub fn stop_clean(&self, host: &str) {
        self.vmove(host, &["stop", VM]).ok();
        let vm = self.until_state(host, VmState::Stopped);
        crate::images::assert_clean(&vm.summary.disks[0].path);
    }

    /// Where the image of [`VM`] lies in a datastore of a host.
    pub fn image(&self, host: &str, datastore: &str) -> PathBuf {
        self.host(host).datastore(datastore).join(VM).join(format!("{DISK}.qcow2"))
    }
}
