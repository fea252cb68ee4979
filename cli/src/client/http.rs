//! The requests: one connection each, JSON in and out, one method per call of the API.

use std::fmt::Write as _;
use std::path::PathBuf;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Address, ClientError};
use crate::api::checkpoint::{CheckpointBegun, CheckpointList, RestoreCheckpoint, TakeCheckpoint};
use crate::api::datastores::AddDatastore;
use crate::api::definitions::{EditVm, NewName};
use crate::api::estimate::{Estimate, EstimateRequest};
use crate::api::placement::{ClusterInventory, Maintenance, MaintenanceRequest};
use crate::api::recovery::{HostStanding, RecoveryReport};
use crate::api::removal::HostRemoval;
use crate::api::types::{
    CONSOLE_PROTOCOL, CreateVm, DatastoreInfo, ErrorBody, ErrorDetail, HostInfo, KnownHost, MoveAnswer,
    MoveProgress, MoveRequest, VmDetail, VmList, VmSummary,
};
use crate::api::watch::MoveList;

/// Largest answer that is read, bytes.
const MAX_ANSWER: usize = 64 << 20;

/// A connection to a VM's serial console, by the messages of `vmove_compute::process::console::wire`.
pub type ConsoleStream = TokioIo<hyper::upgrade::Upgraded>;

/// A client of one agent. Cheap to clone; makes a connection for each request.
#[derive(Debug, Clone)]
pub struct Client {
    address: Address,
}

impl Client {
    /// A client of the agent that listens on this unix socket. Connects at the first request.
    pub fn unix(socket: impl Into<PathBuf>) -> Self {
        Self { address: Address::Unix(socket.into()) }
    }

    /// A client of the agent at this address. Connects at the first request.
    pub fn at(address: Address) -> Self {
        Self { address }
    }

    /// Where the agent is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The agent's own host.
    pub async fn host(&self) -> Result<HostInfo, ClientError> {
        self.call(Method::GET, "/v1/host", None::<&()>).await
    }

    /// All hosts it knows.
    pub async fn hosts(&self) -> Result<Vec<KnownHost>, ClientError> {
        self.call(Method::GET, "/v1/hosts", None::<&()>).await
    }

    /// What it would mean to take a host out of the cluster.
    pub async fn removal_of(&self, host: &str) -> Result<HostRemoval, ClientError> {
        self.call(Method::GET, &format!("/v1/hosts/{}/removal", segment(host)), None::<&()>).await
    }

    /// Takes a host that is gone for ever out of the cluster.
    pub async fn remove_host(&self, host: &str) -> Result<HostRemoval, ClientError> {
        self.call(Method::DELETE, &format!("/v1/hosts/{}", segment(host)), None::<&()>).await
    }

    /// What all hosts have and carry.
    pub async fn inventory(&self) -> Result<ClusterInventory, ClientError> {
        self.call(Method::GET, "/v1/cluster/inventory", None::<&()>).await
    }

    /// Switches maintenance of a host.
    pub async fn set_maintenance(
        &self,
        host: &str,
        request: MaintenanceRequest,
    ) -> Result<Maintenance, ClientError> {
        self.call(Method::PUT, &format!("/v1/hosts/{}/maintenance", segment(host)), Some(&request)).await
    }

    /// Makes a directory of the agent's host one of its datastores.
    pub async fn add_datastore(&self, add: &AddDatastore) -> Result<DatastoreInfo, ClientError> {
        self.call(Method::POST, "/v1/datastores", Some(add)).await
    }

    /// Has the agent's host forget a datastore.
    pub async fn remove_datastore(&self, name: &str) -> Result<(), ClientError> {
        self.command(Method::DELETE, &format!("/v1/datastores/{}", segment(name))).await
    }

    /// VMs of this host, or of all hosts.
    pub async fn vms(&self, all: bool) -> Result<VmList, ClientError> {
        self.call(Method::GET, if all { "/v1/vms?all=true" } else { "/v1/vms" }, None::<&()>).await
    }

    /// One VM.
    pub async fn vm(&self, vm: &str) -> Result<VmDetail, ClientError> {
        self.call(Method::GET, &format!("/v1/vms/{}", segment(vm)), None::<&()>).await
    }

    /// Makes a VM.
    pub async fn create(&self, request: &CreateVm) -> Result<VmSummary, ClientError> {
        self.call(Method::POST, "/v1/vms", Some(request)).await
    }

    /// Changes a stopped VM.
    pub async fn edit(&self, vm: &str, edit: &EditVm) -> Result<VmSummary, ClientError> {
        self.call(Method::PUT, &format!("/v1/vms/{}/definition", segment(vm)), Some(edit)).await
    }

    /// Gives a stopped VM another name.
    pub async fn rename(&self, vm: &str, new: &NewName) -> Result<VmSummary, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/rename", segment(vm)), Some(new)).await
    }

    /// Copies a stopped VM.
    pub async fn clone_vm(&self, vm: &str, new: &NewName) -> Result<VmSummary, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/clone", segment(vm)), Some(new)).await
    }

    /// Starts a VM.
    pub async fn start(&self, vm: &str) -> Result<(), ClientError> {
        self.command(Method::POST, &format!("/v1/vms/{}/start", segment(vm))).await
    }

    /// Presses a VM's power button.
    pub async fn press_power_button(&self, vm: &str) -> Result<(), ClientError> {
        self.command(Method::POST, &format!("/v1/vms/{}/power-button", segment(vm))).await
    }

    /// Ends a VM; its guest is not asked.
    pub async fn stop(&self, vm: &str) -> Result<(), ClientError> {
        self.command(Method::POST, &format!("/v1/vms/{}/stop", segment(vm))).await
    }

    /// Removes a VM and its disks.
    pub async fn remove(&self, vm: &str) -> Result<(), ClientError> {
        self.command(Method::DELETE, &format!("/v1/vms/{}", segment(vm))).await
    }

    /// Begins a move, or plans it.
    pub async fn move_vm(&self, vm: &str, request: &MoveRequest) -> Result<MoveAnswer, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/move", segment(vm)), Some(request)).await
    }

    /// Begins to take a checkpoint of a VM.
    pub async fn take_checkpoint(
        &self,
        vm: &str,
        request: &TakeCheckpoint,
    ) -> Result<CheckpointBegun, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/checkpoints", segment(vm)), Some(request)).await
    }

    /// Checkpoints of all hosts, of one VM or of all.
    pub async fn checkpoints(&self, vm: Option<&str>) -> Result<CheckpointList, ClientError> {
        let only = vm.map_or_else(String::new, |vm| format!("&vm={}", segment(vm)));
        self.call(Method::GET, &format!("/v1/checkpoints?all=true{only}"), None::<&()>).await
    }

    /// Removes a checkpoint.
    pub async fn remove_checkpoint(&self, vm: &str, name: &str) -> Result<(), ClientError> {
        self.command(Method::DELETE, &format!("/v1/checkpoints/{}/{}", segment(vm), segment(name))).await
    }

    /// Has a VM go on from a checkpoint; answered when it runs.
    pub async fn restore(
        &self,
        vm: &str,
        name: &str,
        request: &RestoreCheckpoint,
    ) -> Result<VmSummary, ClientError> {
        let path = format!("/v1/checkpoints/{}/{}/restore", segment(vm), segment(name));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// What a move would take.
    pub async fn estimate(&self, vm: &str, request: &EstimateRequest) -> Result<Estimate, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/estimate", segment(vm)), Some(request)).await
    }

    /// All moves of the cluster that go on or ended moments ago.
    pub async fn moves(&self) -> Result<MoveList, ClientError> {
        self.call(Method::GET, "/v1/moves?all=true", None::<&()>).await
    }

    /// How far a move is, or how it ended.
    pub async fn move_progress(&self, move_id: &str) -> Result<MoveProgress, ClientError> {
        self.call(Method::GET, &format!("/v1/moves/{}", segment(move_id)), None::<&()>).await
    }

    /// Asks for a move to be given up.
    pub async fn cancel(&self, move_id: &str) -> Result<(), ClientError> {
        self.command(Method::DELETE, &format!("/v1/moves/{}", segment(move_id))).await
    }

    /// Has everything of a VM settled that can be; who holds what of it then.
    pub async fn recover(&self, vm: &str) -> Result<RecoveryReport, ClientError> {
        self.call(Method::POST, &format!("/v1/vms/{}/recover", segment(vm)), None::<&()>).await
    }

    /// Makes a host the owner of a VM without the word of a host that is gone.
    pub async fn take_over(&self, vm: &str, host: &str) -> Result<HostStanding, ClientError> {
        let path = format!("/v1/vms/{}/take-over?host={}", segment(vm), segment(host));
        self.call(Method::POST, &path, None::<&()>).await
    }

    /// Removes what a host kept of a VM that another one took over.
    pub async fn discard_lost(&self, vm: &str, host: &str) -> Result<HostStanding, ClientError> {
        let path = format!("/v1/vms/{}/discard-lost?host={}", segment(vm), segment(host));
        self.call(Method::POST, &path, None::<&()>).await
    }

    /// Connects to a VM's serial console where it is now; [`Console`](super::Console) stays with it.
    pub async fn console(&self, vm: &str) -> Result<ConsoleStream, ClientError> {
        let path = format!("/v1/vms/{}/console", segment(vm));
        let what = format!("GET {path}");
        let request = Request::builder()
            .method(Method::GET)
            .uri(&path)
            .header(HOST, "vmove")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, CONSOLE_PROTOCOL)
            .body(Full::default())
            .map_err(|error| transport(&what, &error))?;
        let response = self.send(request, &what).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let (status, body) = collect(response, &what).await?;
            return Err(refusal(status, &body, &what));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| transport(&what, &error))?;
        Ok(TokioIo::new(upgraded))
    }

    /// A request whose answer's content does not matter.
    async fn command(&self, method: Method, path: &str) -> Result<(), ClientError> {
        self.exchange(method, path, Bytes::new()).await.map(|_| ())
    }

    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let what = format!("{method} {path}");
        let decode = |reason: serde_json::Error| ClientError::Decode {
            what: what.clone(),
            reason: reason.to_string(),
        };
        let bytes = match body {
            Some(body) => Bytes::from(serde_json::to_vec(body).map_err(decode)?),
            None => Bytes::new(),
        };
        let answer = self.exchange(method, path, bytes).await?;
        serde_json::from_slice(&answer).map_err(decode)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let what = format!("{method} {path}");
        let mut request = Request::builder().method(method).uri(path).header(HOST, "vmove");
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|error| transport(&what, &error))?;
        let response = self.send(request, &what).await?;
        let (status, body) = collect(response, &what).await?;
        if status.is_success() { Ok(body) } else { Err(refusal(status, &body, &what)) }
    }

    async fn send(
        &self,
        request: Request<Full<Bytes>>,
        what: &str,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self
            .address
            .connect()
            .await
            .map_err(|source| ClientError::Connect { address: self.address.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| transport(what, &error))?;
        // Drives the connection until the answer is read or the upgraded stream is dropped; its error also shows in the answer.
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        sender.send_request(request).await.map_err(|error| transport(what, &error))
    }
}

async fn collect(response: Response<Incoming>, what: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| ClientError::Transport { what: what.to_owned(), reason: error.to_string() })?;
    Ok((status, body.to_bytes()))
}

fn transport(what: &str, error: &dyn std::error::Error) -> ClientError {
    let reason = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    ClientError::Transport { what: what.to_owned(), reason }
}

/// The agent's words, or for something that is no agent's answer (a wrong path, a panic) the status and the text.
fn refusal(status: StatusCode, body: &[u8], what: &str) -> ClientError {
    let detail = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => body.error,
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let line = text.lines().next().unwrap_or_default();
            ErrorDetail {
                code: "internal".to_owned(),
                message: format!("{what}: {status} {line}").trim_end().to_owned(),
                blockers: Vec::new(),
            }
        }
    };
    ClientError::Api { status: status.as_u16(), detail }
}

/// A path segment: everything but unreserved characters (RFC 3986 section 2.3) percent-encoded.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    // A segment of dots alone would be taken as a way up; such a name exists nowhere.
    if out.chars().all(|c| c == '.') { out.replace('.', "%2E") } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::ClientError;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    /// Answers one connection with fixed bytes and gives back what was asked.
    async fn answer_once(listener: UnixListener, answer: &str) -> std::io::Result<String> {
        let (mut stream, _) = listener.accept().await?;
        let mut seen = Vec::new();
        while !seen.windows(4).any(|w| w == b"\r\n\r\n") {
            if stream.read_buf(&mut seen).await? == 0 {
                break;
            }
        }
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        Ok(String::from_utf8_lossy(&seen).into_owned())
    }

    #[tokio::test]
    async fn an_error_body_becomes_the_agents_words() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a.sock");
        let listener = UnixListener::bind(&path)?;
        let body = r#"{"error":{"code":"busy","message":"vm1 is on the move","blockers":["x"]}}"#;
        let answer = format!("HTTP/1.1 409 Conflict\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let (asked, result) = tokio::join!(answer_once(listener, &answer), async {
            Client::unix(&path).start("a vm/..").await
        });
        assert!(asked?.starts_with("POST /v1/vms/a%20vm%2F../start HTTP/1.1\r\n"));
        let error = result.err().ok_or_else(|| anyhow::anyhow!("must be refused"))?;
        assert_eq!(error.code(), Some("busy"));
        assert_eq!(error.to_string(), "vm1 is on the move");
        Ok(())
    }

    #[tokio::test]
    async fn nobody_listening_says_which_socket() {
        let error = Client::unix("/nonexistent/agent.sock").host().await;
        assert!(error.is_err_and(|e| e.is_connection() && e.to_string().contains("/nonexistent/agent.sock")));
    }

    #[tokio::test]
    async fn a_very_long_socket_path_works() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep)?;
        let short = dir.path().join("s");
        std::os::unix::fs::symlink(&deep, &short)?;
        let listener = UnixListener::bind(short.join("a.sock"))?;
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]";
        let (asked, hosts) = tokio::join!(answer_once(listener, answer), async {
            Client::unix(deep.join("a.sock")).hosts().await
        });
        assert!(asked?.starts_with("GET /v1/hosts "));
        assert!(hosts.is_ok_and(|hosts| hosts.is_empty()));
        Ok(())
    }

    #[tokio::test]
    async fn a_console_passes_bytes_both_ways() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a.sock");
        let listener = UnixListener::bind(&path)?;
        let guest = async move {
            let (mut stream, _) = listener.accept().await?;
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\n") && stream.read_buf(&mut seen).await? > 0 {}
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: vmove-console\r\n\r\nboot\n";
            stream.write_all(answer).await?;
            let mut key = [0];
            stream.read_exact(&mut key).await?;
            stream.write_all(&key).await?;
            anyhow::Ok(String::from_utf8_lossy(&seen).to_lowercase())
        };
        let user = async {
            let mut console = Client::unix(&path).console("vm1").await?;
            let mut boot = [0; 5];
            console.read_exact(&mut boot).await?;
            console.write_all(b"c").await?;
            let mut rest = Vec::new();
            console.read_to_end(&mut rest).await?;
            anyhow::Ok((boot, rest))
        };
        let (asked, seen) = tokio::join!(guest, user);
        let asked = asked?;
        assert!(
            asked.starts_with("get /v1/vms/vm1/console ") && asked.contains("upgrade: vmove-console"),
            "{asked}"
        );
        assert_eq!(seen?, (*b"boot\n", b"c".to_vec()));
        Ok(())
    }

    #[test]
    fn segments_cannot_leave_their_place() {
        assert_eq!(segment("vm-1_a.b"), "vm-1_a.b");
        assert_eq!(segment(".."), "%2E%2E");
        assert_eq!(segment("a/b?c"), "a%2Fb%3Fc");
        assert!(matches!(
            refusal(StatusCode::NOT_FOUND, b"nope", "GET /x"),
            ClientError::Api { status: 404, detail } if detail.message == "GET /x: 404 Not Found nope"
        ));
    }
}
