//! Whole agents in temporary directories, asked over their real sockets. VM processes are stood in for by a script that fails.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Method;
use vmove_compute::process::protocol::{IncomingSpec, LaunchSpec, Start};
use vmove_mirror::journal::{MoveId, Record, Standing};
use vmove_storage::{ImageFormat, ImageSpec, OwnerState, Stamp};

use super::config::{Config, DatastoreConfig};
use super::vmdir::{AppendError, VmDir, disks_at};
use super::{Agent, AgentError, cluster, create, http, peers};
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

    fn program(&self) -> std::path::PathBuf {
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
            // A process that another test starts has this one's locks until it is another program.
            let end = Instant::now() + Duration::from_secs(30);
            loop {
                match vm.append(record) {
                    Err(AppendError::InUse) if Instant::now() < end => std::thread::yield_now(),
                    appended => break appended.unwrap(),
                }
            }
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

#[tokio::test]
async fn a_vm_is_made_listed_started_and_removed() {
    let mut host = Host::new("left");
    let client = host.serve().await;
    let info = client.host().await.unwrap();
    assert_eq!(info.name, "left");
    assert_eq!(info.datastores.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["fast", "bulk"]);
    let made = client.create(&host.definition("web")).await.unwrap();
    assert_eq!((made.state, made.generation), (VmState::Stopped, 1));
    assert_eq!(made.disks[0].path, host.image("fast", "web"));
    assert_eq!(Stamp::read(&made.disks[0].path).unwrap().unwrap().state, OwnerState::Owned);
    assert_eq!(code(&client.create(&host.definition("web")).await.unwrap_err()), "name_taken");
    assert_eq!(client.vms(false).await.unwrap().vms, [made]);
    // The stand-in for the VM process fails: its words are passed on, and the VM can be tried again or removed.
    let error = client.start("web").await.unwrap_err();
    assert!(code(&error) == "vm_process" && error.to_string().contains("boom"), "{error}");
    assert_eq!(client.vm("web").await.unwrap().summary.state, VmState::Failed);
    assert_eq!(code(&client.stop("web").await.unwrap_err()), "conflict");
    let request = MoveRequest { datastore: Some("bulk".into()), ..Default::default() };
    assert_eq!(code(&client.move_vm("web", &request).await.unwrap_err()), "conflict");
    let request = MoveRequest { max_downtime_ms: 3_600_001, ..request };
    let error = client.move_vm("web", &request).await.unwrap_err();
    assert!(code(&error) == "invalid" && error.to_string().contains("3600000"), "{error}");
    client.remove("web").await.unwrap();
    assert_eq!(code(&client.vm("web").await.unwrap_err()), "not_found");
    assert!(!host.image("fast", "web").parent().unwrap().exists() && !host.vm("web").path().exists());
    host.end().await;
}

#[tokio::test]
async fn of_two_creations_with_one_name_one_succeeds() {
    let mut host = Host::new("left");
    let client = host.serve().await;
    let request = host.definition("web");
    let (a, b) = tokio::join!(client.create(&request), client.create(&request));
    let failed = [a, b].into_iter().filter_map(Result::err).collect::<Vec<_>>();
    assert_eq!(failed.len(), 1);
    assert!(matches!(code(&failed[0]), "busy" | "name_taken"));
    assert!(host.image("fast", "web").exists(), "the loser must not remove the winner's image");
    host.end().await;
}

#[tokio::test]
async fn what_cannot_be_made_leaves_nothing_behind() {
    let mut host = Host::new("left");
    let client = host.serve().await;
    let mut request = host.definition("web");
    request.definition.disks[0].datastore = "none".into();
    let Err(ClientError::Api { detail, .. }) = client.create(&request).await else { panic!() };
    assert!(detail.blockers[0].contains("it has: fast, bulk"), "{detail:?}");
    let mut request = host.definition("web");
    request.kernel = "/nonexistent".into();
    assert_eq!(code(&client.create(&request).await.unwrap_err()), "storage");
    request.kernel = host.dir.path().join("program");
    assert_eq!(code(&client.create(&request).await.unwrap_err()), "invalid");
    for name in ["../web", "ls"] {
        let request = host.definition(name);
        assert_eq!(code(&client.create(&request).await.unwrap_err()), "invalid", "{name}");
    }
    let mut request = host.definition("web");
    request.definition.disks[0].size_bytes = 513;
    assert_eq!(code(&client.create(&request).await.unwrap_err()), "invalid");
    assert!(client.vms(false).await.unwrap().vms.is_empty());
    assert!(!host.image("fast", "web").parent().unwrap().exists() && !host.vm("web").path().exists());
    // The name is free again.
    client.create(&host.definition("web")).await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn networks_get_an_address_for_life_and_what_is_wrong_with_them_is_named() {
    let mut host = Host::new("left");
    let client = host.serve().await;
    let network = |name: &str, mac: Option<&str>| NetworkDefinition {
        name: name.into(),
        bridge: Some("vmove-none".into()),
        tap: None,
        mac: mac.map(|mac| mac.parse().unwrap()),
    };
    let given = "02:00:00:00:00:01";
    let mut request = host.definition("web");
    request.definition.networks = vec![network("lan", None), network("wan", Some(given))];
    client.create(&request).await.unwrap();
    let made = client.vm("web").await.unwrap().definition.networks;
    assert_eq!(made[0].mac.unwrap().octets()[0] & 3, 2, "local and unicast: {made:?}");
    assert_eq!(made[1].mac.unwrap().to_string(), given);

    let mut request = host.definition("db");
    request.definition.networks = vec![network("lan", Some(given))];
    let Err(ClientError::Api { detail, .. }) = client.create(&request).await else { panic!() };
    assert!(detail.blockers[0].contains(given) && detail.blockers[0].contains("VM web"), "{detail:?}");
    request.definition.networks = vec![network("lan", None), network("lan", None)];
    let Err(ClientError::Api { detail, .. }) = client.create(&request).await else { panic!() };
    assert!(detail.message.contains("\"lan\" is there twice"), "{detail:?}");

    let Err(ClientError::Api { detail, .. }) = client.start("web").await else { panic!() };
    let named = |blocker: &&String| blocker.contains("bridge vmove-none");
    assert_eq!(detail.blockers.iter().filter(named).count(), 2, "{detail:?}");
    assert_eq!(client.vm("web").await.unwrap().definition.networks, made, "kept");
    host.end().await;
}

#[tokio::test]
async fn one_agent_for_a_state_directory_and_only_its_owner_may_ask() {
    let mut host = Host::new("left");
    host.serve().await;
    let second = Agent::open(&host.state(), host.config.clone(), host.program());
    assert!(second.unwrap_err().to_string().contains("another agent"));
    let mode = std::fs::metadata(host.agent().socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    host.end().await;
}

#[tokio::test]
async fn a_joined_host_is_known_and_requests_are_passed_on() {
    let (mut left, to_left, mut right, to_right) = pair().await;
    for client in [&to_left, &to_right] {
        eventually("both know each other", async || {
            let hosts = client.hosts().await.unwrap();
            (hosts.len() == 2 && hosts.iter().all(|host| host.reachable)).then_some(())
        })
        .await;
    }
    to_left.create(&left.definition("web")).await.unwrap();
    assert_eq!(to_right.vm("web").await.unwrap().summary.host, "left");
    assert_eq!(to_right.vms(true).await.unwrap().vms.len(), 1);
    assert!(to_right.vms(false).await.unwrap().vms.is_empty());
    let taken = to_right.create(&right.definition("web")).await.unwrap_err();
    assert!(code(&taken) == "name_taken" && taken.to_string().contains("left"), "{taken}");
    let console = to_right.console("web").await.map(|_| ()).unwrap_err();
    assert_eq!(code(&console), "conflict", "passed on, and the VM does not run");
    to_right.remove("web").await.unwrap();
    assert!(to_left.vms(false).await.unwrap().vms.is_empty());
    assert_eq!(code(&to_right.move_progress("nosuch").await.unwrap_err()), "not_found");
    left.end().await;
    let all = to_right.vms(true).await.unwrap();
    assert_eq!(all.unreachable, ["left"]);
    right.end().await;
}

#[tokio::test]
async fn a_token_lets_one_host_in_and_names_are_unique() {
    let (mut left, to_left, mut right, _) = pair().await;
    let address = left.config.listen;
    let again = Host::new("left");
    let token = cluster::issue_token(&left.state(), Duration::from_mins(1)).unwrap();
    let same = cluster::join(&again.state(), &again.config, address, &token).await.unwrap_err();
    assert!(same.to_string().contains("already"), "{same}");
    // The refusal did not use the token up.
    let third = Host::new("third");
    cluster::join(&third.state(), &third.config, address, &token).await.unwrap();
    let fourth = Host::new("fourth");
    let used = cluster::join(&fourth.state(), &fourth.config, address, &token).await.unwrap_err();
    assert!(used.to_string().contains("not valid"), "{used}");
    let key = third.state().join("identity/key.pem");
    assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!third.state().join("identity/ca-key.pem").exists());
    assert!(cluster::issue_token(&third.state(), Duration::from_mins(1)).is_err());
    eventually("the others are told", async || {
        let hosts = right.agent().known_hosts(false).await.unwrap();
        hosts.iter().any(|host| host.name == "third").then_some(())
    })
    .await;
    assert!(to_left.hosts().await.unwrap().iter().any(|host| host.name == "third" && !host.reachable));
    left.end().await;
    right.end().await;
}

fn offer(disk: &str, dry_run: bool) -> Offer {
    let kernel = b"kernel";
    Offer {
        version: PEER_VERSION,
        move_id: uuid::Uuid::new_v4().to_string(),
        from_host: "left".into(),
        definition: definition("web", "fast"),
        generation: 2,
        disks: vec![OfferedDisk {
            image: ImageShape {
                name: disk.into(),
                format: DiskFormat::Qcow2,
                virtual_bytes: 1 << 20,
                cluster_bytes: 65536,
                allocated_bytes: 1 << 16,
            },
            source_datastore_id: "elsewhere".into(),
            datastore: None,
        }],
        plain: false,
        cpu_features: vec![],
        kernel: FileDigest { bytes: 6, blake3: blake3::hash(kernel).to_hex().to_string() },
        initrd: None,
        clock_ms: None,
        dry_run,
    }
}

async fn call<R: serde::de::DeserializeOwned>(
    from: &Host,
    method: Method,
    path: &str,
    body: Option<&Offer>,
) -> Result<R, super::error::ApiError> {
    from.agent().peers.call("right", method, path, body, peers::LONG).await
}

#[tokio::test]
async fn an_offer_is_judged_kept_and_taken_back() {
    let (mut left, _, mut right, to_right) = pair().await;
    let dry: OfferAccepted =
        call(&left, Method::POST, "/v1/incoming", Some(&offer("vda", true))).await.unwrap();
    assert!(dry.blockers.is_empty() && dry.disks[0].path == right.image("fast", "web"), "{dry:?}");
    assert!(!right.vm("web").path().exists(), "nothing is made for a dry run");
    // Everything that stands in the way, at once.
    let mut bad = offer("vda", false);
    bad.cpu_features = vec!["nosuchfeature".into()];
    bad.disks[0].datastore = Some("nosuchstore".into());
    let refused = call::<OfferAccepted>(&left, Method::POST, "/v1/incoming", Some(&bad)).await.unwrap_err();
    assert_eq!((refused.code.as_str(), refused.blockers.len()), ("blocked", 2), "{refused:?}");
    let mut liar = offer("vda", false);
    liar.from_host = "third".into();
    let refused = call::<OfferAccepted>(&left, Method::POST, "/v1/incoming", Some(&liar)).await.unwrap_err();
    assert_eq!(refused.code, "forbidden");
    // A real one: the name is reserved, the file is checked, and it can be taken back.
    let real = offer("vda", false);
    let _: OfferAccepted = call(&left, Method::POST, "/v1/incoming", Some(&real)).await.unwrap();
    // Offered anew by the same host: it has died over the first one, or given it up. Only asking changes nothing.
    let asked: OfferAccepted =
        call(&left, Method::POST, "/v1/incoming", Some(&offer("vda", true))).await.unwrap();
    assert!(asked.blockers.is_empty(), "{asked:?}");
    let (first, real) = (real, offer("vda", false));
    let _: OfferAccepted = call(&left, Method::POST, "/v1/incoming", Some(&real)).await.unwrap();
    let first = format!("/v1/incoming/{}/start", first.move_id);
    let off = call::<Listening>(&left, Method::POST, &first, None).await.unwrap_err();
    assert_eq!(off.code, "not_found", "{off:?}");
    assert_eq!(code(&to_right.create(&right.definition("web")).await.unwrap_err()), "busy");
    let base = format!("/v1/incoming/{}", real.move_id);
    let early = call::<Listening>(&left, Method::POST, &format!("{base}/start"), None).await.unwrap_err();
    assert!(early.message.contains("kernel has not been sent"), "{early:?}");
    eventually("what was refused is gone", async || (!right.vm("web").path().exists()).then_some(())).await;

    let real = offer("vda", false);
    let base = format!("/v1/incoming/{}", real.move_id);
    eventually("the name is free again", async || {
        call::<OfferAccepted>(&left, Method::POST, "/v1/incoming", Some(&real)).await.ok()
    })
    .await;
    let peers = &left.agent().peers;
    let kernel = format!("{base}/files/kernel");
    let wrong: Result<(), _> = peers.send("right", Method::PUT, &kernel, "kernal".into(), peers::LONG).await;
    assert_eq!(wrong.unwrap_err().code, "invalid");
    let () = peers.send("right", Method::PUT, &kernel, "kernel".into(), peers::LONG).await.unwrap();
    assert_eq!(std::fs::read(right.vm("web").kernel()).unwrap(), b"kernel");
    let () = call(&left, Method::DELETE, &base, None).await.unwrap();
    assert!(!right.vm("web").path().exists());
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn a_target_process_that_fails_leaves_nothing_behind() {
    let (mut left, _, mut right, _) = pair().await;
    let real = offer("vda", false);
    let base = format!("/v1/incoming/{}", real.move_id);
    let _: OfferAccepted = call(&left, Method::POST, "/v1/incoming", Some(&real)).await.unwrap();
    let kernel = format!("{base}/files/kernel");
    let peers = &left.agent().peers;
    let () = peers.send("right", Method::PUT, &kernel, "kernel".into(), peers::LONG).await.unwrap();
    let failed = call::<Listening>(&left, Method::POST, &format!("{base}/start"), None).await.unwrap_err();
    assert!(failed.message.contains("boom"), "{failed:?}");
    eventually("the directory is gone", async || (!right.vm("web").path().exists()).then_some(())).await;
    assert!(!right.image("fast", "web").parent().unwrap().exists());
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn calls_between_agents_are_not_for_users_nor_strangers() {
    let (mut left, _, mut right, to_right) = pair().await;
    let stream = to_right.address().connect().await.unwrap();
    let mut sender = peers::handshake(stream).await.unwrap();
    let request = hyper::Request::delete("/v1/incoming/x").header("host", "x").body("".into()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 403);
    // Without a certificate everything but joining is refused.
    let fingerprint =
        crate::identity::tls::fingerprint_of_pem(&read(&left.state().join("identity/ca.pem"))).unwrap();
    let tls = crate::identity::tls::joining_client(&fingerprint).unwrap();
    let tcp = tokio::net::TcpStream::connect(right.config.listen).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("right").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
    let mut sender = peers::handshake(stream).await.unwrap();
    for path in ["/v1/host", "/v1/vms", "/nosuch"] {
        let request = hyper::Request::get(path).header("host", "x").body("".into()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 403, "{path}");
        let refused = peers::answer::<()>(response, path).await.unwrap_err();
        assert_eq!(refused.code, "forbidden");
    }
    left.end().await;
    right.end().await;
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

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

/// Left (source) and right (target) with a move between them that only the journals know of.
async fn between(source: &[Record], target_prepared: bool) -> (Host, Client, Host, Client) {
    let (mut left, _, mut right, _) = pair().await;
    left.end().await;
    right.end().await;
    let id = MoveId::new("m").unwrap();
    let stamp = |generation, state| Some(Stamp { vm: "web".into(), generation, state });
    let mut records = vec![Record::Owner { generation: 1, disks: left.disks("web") }];
    records.extend_from_slice(source);
    left.remains("web", stamp(1, OwnerState::Owned), &records);
    let mut records = vec![Record::Incoming {
        move_id: id.clone(),
        from_host: "left".into(),
        generation: 2,
        disks: right.disks("web"),
    }];
    if target_prepared {
        records.push(Record::Prepared { move_id: id });
    }
    right.remains("web", stamp(2, OwnerState::Incoming), &records);
    let to_right = right.serve().await;
    let to_left = left.serve().await;
    (left, to_left, right, to_right)
}

#[tokio::test]
async fn both_dead_before_the_commit_the_source_has_it() {
    let id = MoveId::new("m").unwrap();
    let moving = Record::Moving { move_id: id.clone(), to_host: Some("right".into()), generation: 2 };
    let (mut left, to_left, mut right, _) = between(&[moving], true).await;
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
    let (mut left, to_left, mut right, to_right) =
        between(&[moving, Record::Committed { move_id: id }], true).await;
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
    for to_host in [Some("third".to_owned()), None] {
        let name = to_host.as_deref().unwrap_or("nowhere");
        let records = [
            Record::Owner { generation: 1, disks: right.disks(name) },
            Record::Moving { move_id: id.clone(), to_host: to_host.clone(), generation: 2 },
        ];
        let vm = right.remains(name, None, &records);
        let verdict = |id: &str| format!("/v1/vms/{name}/moves/{id}/verdict");
        let refused = call::<VerdictAnswer>(&left, Method::GET, &verdict("m"), None).await.unwrap_err();
        assert_eq!(refused.code, "forbidden");
        assert_eq!(vm.records().unwrap(), records);
        // The word on an earlier move is nobody's secret.
        let earlier: VerdictAnswer = call(&left, Method::GET, &verdict("l"), None).await.unwrap();
        assert_eq!(earlier.verdict, Verdict::Unknown);
    }
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn of_two_offers_of_one_move_one_is_kept_and_the_other_leaves_nothing() {
    let (mut left, _, mut right, _) = pair().await;
    let first = offer("vda", false);
    let mut second = first.clone();
    second.definition.name = "db".into();
    let (a, b): (Result<OfferAccepted, _>, Result<OfferAccepted, _>) = tokio::join!(
        call(&left, Method::POST, "/v1/incoming", Some(&first)),
        call(&left, Method::POST, "/v1/incoming", Some(&second)),
    );
    let (kept, refused, error) = match (a, b) {
        (Ok(_), Err(error)) => ("web", "db", error),
        (Err(error), Ok(_)) => ("db", "web", error),
        both => panic!("{both:?}"),
    };
    assert_eq!(error.code, "conflict");
    eventually("what was refused is gone", async || (!right.vm(refused).path().exists()).then_some(())).await;
    assert!(right.vm(kept).path().exists());
    // Its name is free.
    let mut again = offer("vda", false);
    again.definition.name = refused.into();
    eventually("the name is free again", async || {
        call::<OfferAccepted>(&left, Method::POST, "/v1/incoming", Some(&again)).await.ok()
    })
    .await;
    left.end().await;
    right.end().await;
}

/// Something that lives, answers nothing, and looks like the VM process of a directory; ends when its standard input is closed.
fn deaf_process(vm: &VmDir, scratch: &Path) -> std::process::Child {
    std::fs::write(scratch.join(super::process::SUBCOMMAND), "read line\n").unwrap();
    std::process::Command::new("sh")
        .args([super::process::SUBCOMMAND, "--dir"])
        .arg(vm.path())
        .current_dir(scratch)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn a_move_taken_back_never_ends_a_vm_that_is_here() {
    let (mut left, _, mut right, _) = pair().await;
    let id = MoveId::new("m").unwrap();
    let records = [
        Record::Incoming {
            move_id: id.clone(),
            from_host: "left".into(),
            generation: 2,
            disks: right.disks("web"),
        },
        Record::Prepared { move_id: id },
        Record::Owner { generation: 2, disks: right.disks("web") },
    ];
    let vm = right.remains("web", None, &records);
    let launched_from = |host: &str| {
        let spec = LaunchSpec {
            vm: definition("web", "fast"),
            kernel: vm.kernel(),
            initrd: None,
            host: "right".into(),
            generation: 2,
            disks: vec![],
            identity: None,
            start: Start::Incoming(IncomingSpec {
                move_id: "m".into(),
                from_host: host.into(),
                listen_ip: "127.0.0.1".into(),
                images: vec![],
                plain: false,
            }),
        };
        vm.save_launch(&spec).unwrap();
    };
    let scratch = tempfile::tempdir().unwrap();
    let mut process = deaf_process(&vm, scratch.path());
    eventually("the process is seen", async || super::process::find(vm.path())).await;
    for (host, code) in [("third", "forbidden"), ("left", "undecided")] {
        launched_from(host);
        let refused = call::<()>(&left, Method::DELETE, "/v1/incoming/m", None).await.unwrap_err();
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(process.try_wait().unwrap().is_none(), "it lives");
    }
    drop(process.stdin.take());
    process.wait().unwrap();
    left.end().await;
    right.end().await;
}

#[tokio::test]
async fn old_reports_of_moves_go() {
    let mut host = Host::new("left");
    host.serve().await;
    let archive = host.agent().archive_dir().unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_hours(1);
    for (age, name) in ["b.json", "c.json", "a.json", "other"].iter().enumerate() {
        let file = std::fs::File::create(archive.join(name)).unwrap();
        file.set_modified(long_ago - Duration::from_secs(age as u64)).unwrap();
    }
    host.agent().prune_reports(2).unwrap();
    let left = |name: &str| archive.join(name).exists();
    assert!(left("b.json") && left("c.json") && !left("a.json") && left("other"));
    host.end().await;
}

#[test]
fn the_committed_document_is_that_of_the_routes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let now = http::openapi().unwrap();
    assert!(
        read(&path) == now,
        "docs/openapi.json is not up to date: run `cargo run -p vmove -- agent --openapi > docs/openapi.json`"
    );
}

#[test]
fn definitions_that_cannot_be_are_refused() {
    create::check_definition(&definition("web", "")).unwrap();
    let bad: [fn(&mut VmDefinition); 6] = [
        |vm| vm.name = "-x".into(),
        |vm| vm.vcpus = 0,
        |vm| vm.memory_mib = 0,
        |vm| vm.cmdline = "a\0b".into(),
        |vm| vm.disks[0].size_bytes = 0,
        |vm| vm.disks.push(vm.disks[0].clone()),
    ];
    for (index, spoil) in bad.into_iter().enumerate() {
        let mut vm = definition("web", "");
        spoil(&mut vm);
        assert_eq!(create::check_definition(&vm).unwrap_err().code, "invalid", "case {index}");
    }
}
