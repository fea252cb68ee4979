//! The agent's API, asked over real sockets: VMs, hosts, calls between agents.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use vmove_compute::process::protocol::{IncomingSpec, LaunchSpec, Start};
use vmove_mirror::journal::{MoveId, Record};
use vmove_storage::{OwnerState, Stamp};

use super::test_hosts::{Host, code, definition, eventually, pair};
use super::vmdir::VmDir;
use super::{Agent, cluster, create, http, peers};
use crate::api::types::*;
use crate::client::ClientError;

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
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
    request.kernel = host.program();
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
    let second = Agent::open(&host.state(), host.config().clone(), host.program());
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
    let address = left.config().listen;
    let again = Host::new("left");
    let token = cluster::issue_token(&left.state(), Duration::from_mins(1)).unwrap();
    let same = cluster::join(&again.state(), again.config(), address, &token).await.unwrap_err();
    assert!(same.to_string().contains("already"), "{same}");
    // The refusal did not use the token up.
    let third = Host::new("third");
    cluster::join(&third.state(), third.config(), address, &token).await.unwrap();
    let fourth = Host::new("fourth");
    let used = cluster::join(&fourth.state(), fourth.config(), address, &token).await.unwrap_err();
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
    let tcp = tokio::net::TcpStream::connect(right.config().listen).await.unwrap();
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
