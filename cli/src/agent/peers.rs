//! Calls to other agents: TLS by host name, one connection each, JSON in and out, with deadlines and caps.
//!
//! Lives here: the client side between agents, and the list of hosts they are found by. Never enters: what is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::config::HostsStore;
use super::error::ApiError;
use crate::api::removal::RemovedHosts;
use crate::api::types::{ErrorBody, FORWARDED_HEADER, HostAddress};
use crate::identity::tls::HostTls;

/// Time for a connection with its handshake.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Time for a call that another agent answers from what it knows.
pub const SHORT: Duration = Duration::from_secs(5);
/// Time for a call that starts a process or writes files.
pub const LONG: Duration = Duration::from_mins(1);
/// Largest answer of another agent that is read, bytes.
const MAX_ANSWER: usize = 16 << 20;

/// The other agents of the cluster.
#[derive(Debug)]
pub struct Peers {
    own: String,
    tls: Option<HostTls>,
    store: HostsStore,
    /// From the configuration: always there.
    fixed: BTreeMap<String, String>,
    learned: Mutex<BTreeMap<String, String>>,
    removed: Mutex<RemovedHosts>,
    /// VMs of each host when it was last asked.
    seen: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Peers {
    /// The hosts of the configuration and those learned before.
    pub fn open(
        own: &str,
        tls: Option<HostTls>,
        fixed: &[HostAddress],
        store: HostsStore,
    ) -> Result<Self, super::config::ConfigError> {
        let learned = Mutex::new(store.load()?);
        let (removed, seen) = (Mutex::new(store.load_removed()?), Mutex::new(store.load_seen()));
        let fixed = fixed.iter().map(|host| (host.name.clone(), host.address.clone())).collect();
        Ok(Self { own: own.to_owned(), tls, store, fixed, learned, removed, seen })
    }

    /// All other hosts of the cluster, name -> address.
    pub fn all(&self) -> BTreeMap<String, String> {
        let mut all = self.learned().clone();
        all.extend(self.fixed.clone());
        all.remove(&self.own);
        let removed = lock(&self.removed);
        all.retain(|name, _| !removed.names.contains(name));
        all
    }

    /// Adds a host, or gives it another address; on disk when this returns.
    pub fn learn(&self, host: &HostAddress) -> Result<(), ApiError> {
        let mut learned = self.learned();
        if host.name == self.own
            || self.is_removed(&host.name)
            || learned.get(&host.name) == Some(&host.address)
        {
            return Ok(());
        }
        let mut next = learned.clone();
        next.insert(host.name.clone(), host.address.clone());
        self.store.save(&next).map_err(|e| ApiError::storage(e.to_string()))?;
        *learned = next;
        Ok(())
    }

    fn learned(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        lock(&self.learned)
    }

    /// Hosts that were taken out of the cluster.
    pub fn removed(&self) -> RemovedHosts {
        lock(&self.removed).clone()
    }

    /// Whether a host was taken out of the cluster.
    pub fn is_removed(&self, host: &str) -> bool {
        lock(&self.removed).names.contains(host)
    }

    /// Takes hosts out of the cluster, this one never; on disk when this returns.
    pub fn remove(&self, hosts: &BTreeSet<String>) -> Result<(), ApiError> {
        let mut removed = lock(&self.removed);
        let mut next = removed.clone();
        next.names.extend(hosts.iter().filter(|host| **host != self.own).cloned());
        if next != *removed {
            self.store.save_removed(&next).map_err(|e| ApiError::storage(e.to_string()))?;
            *removed = next;
        }
        Ok(())
    }

    /// VMs of a host when it was last asked.
    pub fn seen(&self, host: &str) -> Vec<String> {
        lock(&self.seen).get(host).into_iter().flatten().cloned().collect()
    }

    /// Notes the VMs of a host; on disk when this returns.
    pub fn saw(&self, host: &str, vms: BTreeSet<String>) -> Result<(), ApiError> {
        let mut seen = lock(&self.seen);
        if seen.get(host) == Some(&vms) {
            return Ok(());
        }
        seen.insert(host.to_owned(), vms);
        self.store.save_seen(&seen).map_err(|e| ApiError::storage(e.to_string()))
    }

    /// The address of a host.
    pub fn address(&self, host: &str) -> Result<String, ApiError> {
        if self.is_removed(host) {
            return Err(ApiError::not_found(format!("host {host:?} was removed from the cluster")));
        }
        let all = self.all();
        all.get(host).cloned().ok_or_else(|| {
            let known: Vec<&str> = all.keys().map(String::as_str).collect();
            ApiError::not_found(format!(
                "host {host:?} is not known here (known: {})",
                if known.is_empty() { "none; see `vmove join`".to_owned() } else { known.join(", ") }
            ))
        })
    }

    /// A connection to a host, proved to be that host.
    pub async fn connect(&self, host: &str) -> Result<SendRequest<Body>, ApiError> {
        let address = self.address(host)?;
        let tls = self.tls.as_ref().ok_or_else(|| {
            ApiError::conflict("this host has no identity; run `vmove init` or `vmove join`")
        })?;
        let unreachable = |why: String| {
            ApiError::unreachable(format!(
                "cannot reach the agent of host {host} at {address}: {why}; is `vmove agent` running there?"
            ))
        };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| ApiError::invalid(format!("{host:?} is no host name")))?;
        let connecting = async {
            let tcp = TcpStream::connect(&address).await.map_err(|e| e.to_string())?;
            tcp.set_nodelay(true).map_err(|e| e.to_string())?;
            let stream =
                TlsConnector::from(tls.client.clone()).connect(name, tcp).await.map_err(|e| e.to_string())?;
            handshake(stream).await
        };
        match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(result) => result.map_err(unreachable),
            Err(_) => Err(unreachable(format!("nothing within {} s", CONNECT_DEADLINE.as_secs()))),
        }
    }

    /// One call with JSON both ways. An answer that is not a success is the other agent's error, under its own words.
    pub async fn call<R: DeserializeOwned>(
        &self,
        host: &str,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
        deadline: Duration,
    ) -> Result<R, ApiError> {
        let body = match body {
            Some(value) => Body::from(
                serde_json::to_vec(value)
                    .map_err(|e| ApiError::internal(format!("cannot write JSON: {e}")))?,
            ),
            None => Body::empty(),
        };
        self.send(host, method, path, body, deadline).await
    }

    /// One call with any body.
    pub async fn send<R: DeserializeOwned>(
        &self,
        host: &str,
        method: Method,
        path: &str,
        body: Body,
        deadline: Duration,
    ) -> Result<R, ApiError> {
        let what = format!("{method} {path} on host {host}");
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json")
            .header(FORWARDED_HEADER, &self.own)
            .body(body)
            .map_err(|e| ApiError::internal(format!("{what}: {e}")))?;
        let exchange = async {
            let mut sender = self.connect(host).await?;
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| ApiError::unreachable(format!("{what}: {e}")))?;
            answer(response, &what).await
        };
        tokio::time::timeout(deadline, exchange).await.unwrap_or_else(|_| {
            Err(ApiError::unreachable(format!("{what}: no answer within {} s", deadline.as_secs())))
        })
    }
}

impl Peers {
    /// A file of another host, as it comes. Each part must come within [`LONG`].
    pub async fn fetch(
        &self,
        host: &str,
        path: &str,
    ) -> Result<BoxStream<'static, Result<Bytes, ApiError>>, ApiError> {
        let what = format!("GET {path} on host {host}");
        let request = Request::get(path)
            .header(HOST, host)
            .header(FORWARDED_HEADER, &self.own)
            .body(Body::empty())
            .map_err(|e| ApiError::internal(format!("{what}: {e}")))?;
        let mut sender = self.connect(host).await?;
        let late = |_| ApiError::unreachable(format!("{what}: nothing within {} s", LONG.as_secs()));
        let response = tokio::time::timeout(LONG, sender.send_request(request)).await.map_err(late)?;
        let response = response.map_err(|e| ApiError::unreachable(format!("{what}: {e}")))?;
        if !response.status().is_success() {
            return answer(response, &what).await.and_then(|()| Err(ApiError::unreachable(what)));
        }
        let parts = Body::new(response.into_body()).into_data_stream();
        // The sender must live as long as the answer comes.
        Ok(stream::unfold((parts, sender, what), |(mut parts, sender, what)| async move {
            let part = match tokio::time::timeout(LONG, parts.next()).await {
                Ok(part) => part?.map_err(|e| ApiError::unreachable(format!("{what}: it broke off: {e}"))),
                Err(_) => Err(ApiError::unreachable(format!("{what}: it has stalled"))),
            };
            Some((part, (parts, sender, what)))
        })
        .boxed())
    }

    /// One `GET` to every other host at once; answers as they come in. Dropping the set ends those that are still out.
    pub fn ask_all<R: DeserializeOwned + Send + 'static>(
        self: &Arc<Self>,
        path: &str,
        deadline: Duration,
    ) -> JoinSet<(String, Result<R, ApiError>)> {
        let mut asked = JoinSet::new();
        for host in self.all().into_keys() {
            let (peers, path) = (self.clone(), path.to_owned());
            asked.spawn(async move {
                let answer = peers.call(&host, Method::GET, &path, None::<&()>, deadline).await;
                (host, answer)
            });
        }
        asked
    }

    /// One `GET` to every other host at once; the first whose answer is `right`.
    pub async fn find<R: DeserializeOwned + Send + 'static>(
        self: &Arc<Self>,
        path: &str,
        right: impl Fn(&R) -> bool,
    ) -> Option<String> {
        let mut asked = self.ask_all::<R>(path, SHORT);
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok((host, Ok(answer))) if right(&answer) => return Some(host),
                _ => {}
            }
        }
        None
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain map operations under the locks: nothing is left half done by a panic.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// HTTP/1.1 on a connection that is there.
pub async fn handshake<S>(stream: S) -> Result<SendRequest<Body>, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to another agent broke");
        }
    });
    Ok(sender)
}

/// Reads a JSON answer or the error in its place. `()` fits an empty or any JSON body.
pub async fn answer<R: DeserializeOwned>(
    response: Response<hyper::body::Incoming>,
    what: &str,
) -> Result<R, ApiError> {
    let status = response.status();
    let bytes = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|e| ApiError::unreachable(format!("{what}: the answer broke off: {e}")))?
        .to_bytes();
    if status.is_success() {
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        return serde_json::from_slice(text)
            .map_err(|e| ApiError::unreachable(format!("{what}: answer not understood: {e}")));
    }
    Err(match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(body) => ApiError::from_peer(status, body.error),
        Err(_) => ApiError::unreachable(format!("{what}: HTTP status {status}")),
    })
}

/// Whether an error says that the thing is not at the host that was asked.
pub fn is_not_found(error: &ApiError) -> bool {
    error.status == StatusCode::NOT_FOUND
}
