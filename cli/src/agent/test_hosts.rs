//! Whole agents in temporary directories, asked over their real sockets: what the agent's tests stand on. VM processes are stood in for by
//! a script that fails.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmove_mirror::journal::Record;
use vmove_storage::{ImageFormat, ImageSpec, Stamp};

use super::config::{Config, DatastoreConfig};
use super::vmdir::{VmDir, disks_at};
use super::{Agent, AgentError, cluster};
use crate::api::types::*;
use crate::client::{Client, ClientError};

/// An agent that runs in this process.
pub(super) struct Host {
    dir: tempfile::TempDir,
    config: Config,
    agent: Option<Arc<Agent>>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

/// What begins as a kernel does: an ELF file for x86-64.
pub(super) const KERNEL: &[u8] = b"\x7fELF\x02\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Host {
    /// A host with two datastores, `fast` (default) and `bulk`; nothing runs yet.
    pub(super) fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let datastores = ["fast", "bulk"].map(|name| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            DatastoreConfig { name: name.into(), path }
        });
        // A stand-in for the VM process: says why, and fails.
        let program = dir.path().join("program");
        std::fs::write(&program, "#!/bin/sh\necho boom > \"$3/error.txt\"\nexit 1\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(dir.path().join("kernel"), KERNEL).unwrap();
        let listen = format!("127.0.0.1:{}", free_port()).parse().unwrap();
        let config = Config { datastores: datastores.into(), ..Config::new(name, listen) };
        Self { dir, config, agent: None, serving: None }
    }

    pub(super) fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("state")
    }

    pub(super) fn program(&self) -> std::path::PathBuf {
        self.dir.path().join("program")
    }

    /// It believes that there is another host at this address.
    pub(super) fn knowing(mut self, name: &str, address: &str) -> Self {
        self.config.hosts.push(HostAddress { name: name.into(), address: address.into() });
        self
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) async fn serve(&mut self) -> Client {
        // Connections of an agent that has just ended may hold it for a moment.
        let agent = eventually("the state directory is free", async || {
            match Agent::open(&self.state(), self.config.clone(), self.program()) {
                Err(AgentError::Running { .. }) => None,
                opened => Some(opened.unwrap()),
            }
        })
        .await;
        let (ready, wait) = tokio::sync::oneshot::channel();
        let serving = agent.clone();
        self.serving = Some(tokio::spawn(async move {
            serving.serve(|| ready.send(()).unwrap()).await.unwrap();
        }));
        wait.await.unwrap();
        let client = Client::unix(agent.socket());
        self.agent = Some(agent);
        client
    }

    pub(super) fn agent(&self) -> &Arc<Agent> {
        self.agent.as_ref().unwrap()
    }

    pub(super) async fn end(&mut self) {
        self.agent.take().unwrap().end();
        self.serving.take().unwrap().await.unwrap();
    }

    pub(super) fn vm(&self, name: &str) -> VmDir {
        VmDir::new(std::fs::canonicalize(self.state()).unwrap().join("vms").join(name))
    }

    pub(super) fn image(&self, store: &str, vm: &str) -> std::path::PathBuf {
        std::fs::canonicalize(self.dir.path()).unwrap().join(store).join(vm).join("vda.qcow2")
    }

    pub(super) fn definition(&self, name: &str) -> CreateVm {
        CreateVm {
            definition: definition(name, ""),
            kernel: self.dir.path().join("kernel"),
            initrd: None,
            images: Default::default(),
            cloud_init: None,
        }
    }

    /// A VM's directory with one disk in `fast`, stamped and journaled as told.
    pub(super) fn remains(&self, name: &str, stamp: Option<Stamp>, records: &[Record]) -> VmDir {
        let vm = self.vm(name);
        std::fs::create_dir_all(vm.path()).unwrap();
        vm.save_definition(&definition(name, "fast")).unwrap();
        std::fs::write(vm.kernel(), KERNEL).unwrap();
        let image = self.image("fast", name);
        if let Some(stamp) = stamp {
            std::fs::create_dir_all(image.parent().unwrap()).unwrap();
            vmove_storage::create(&image, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
            stamp.write(&image).unwrap();
        }
        for record in records {
            vm.append(record).unwrap();
        }
        vm
    }

    pub(super) fn disks(&self, name: &str) -> Vec<vmove_mirror::journal::DiskAt> {
        let path = self.image("fast", name);
        disks_at(&[DiskPlacement { name: "vda".into(), datastore: "fast".into(), path }]).unwrap()
    }
}

pub(super) fn definition(name: &str, datastore: &str) -> VmDefinition {
    VmDefinition {
        name: name.into(),
        vcpus: 1,
        memory_mib: 16,
        cmdline: String::new(),
        cpu_features: vec![],
        disks: vec![DiskDefinition {
            name: "vda".into(),
            format: DiskFormat::Qcow2,
            size_bytes: 1 << 20,
            datastore: datastore.into(),
            read_only: false,
        }],
        networks: vec![],
        apart: vec![],
    }
}

pub(super) fn code(error: &ClientError) -> &str {
    error.code().unwrap_or_else(|| panic!("no answer of the agent: {error}"))
}

/// Asks again and again until the answer is right; fails after a long time.
pub(super) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < end, "{what}: not within 30 s");
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Two hosts of one cluster that have found each other.
pub(super) async fn pair() -> (Host, Client, Host, Client) {
    let (mut left, mut right) = (Host::new("left"), Host::new("right"));
    let token = cluster::init(&left.state(), &left.config, Duration::from_mins(1)).unwrap();
    let to_left = left.serve().await;
    let address = left.config.listen;
    let answer = cluster::join(&right.state(), &right.config, address, &token).await.unwrap();
    assert_eq!(answer.hosts[0].name, "left");
    let to_right = right.serve().await;
    (left, to_left, right, to_right)
}
