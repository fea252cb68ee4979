//! Becoming one of a cluster, and staying acquainted: `init`, `join` from both sides, the list of hosts.
//!
//! Lives here: who is let in and who is told. Never enters: certificates and tokens themselves (identity), VMs.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::config::{Config, HostsStore};
use super::error::{ApiError, blocking};
use super::{Agent, AgentError, peers};
use crate::api::types::{HostAddress, HostInfo, JoinAnswer, JoinRequest, KnownHost};
use crate::identity::authority::{Authority, host_key, signing_request};
use crate::identity::files::{IdentityFiles, write_private};
use crate::identity::tls::{fingerprint_of_pem, joining_client};
use crate::identity::token::{Token, TokenStore};
use crate::identity::{IdentityError, check_host_name};

/// How long a host has to show that it is there.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// How often hosts tell each other of the hosts they know.
const GOSSIP_INTERVAL: Duration = Duration::from_mins(1);
/// Most hosts of a cluster; more in an answer is not believed.
const MAX_HOSTS: usize = 4096;

/// Makes a cluster of one host: authority, identity, configuration. Gives a token for the next host.
pub fn init(state: &Path, config: &Config, lifetime: Duration) -> Result<Token, AgentError> {
    config.check()?;
    let files = IdentityFiles::of(state);
    refuse_second_identity(state)?;
    super::make_private_dir(state)?;
    files.create_dir()?;
    let (authority, ca_key) = Authority::create()?;
    let key = host_key()?;
    let cert = authority.issue(&config.name, config.listen.ip(), &key)?;
    let paths = files.paths();
    write_private(&files.ca_key(), &ca_key)?;
    write_private(&paths.ca, authority.cert_pem())?;
    write_private(&paths.cert, &cert)?;
    config.save(state)?;
    // Last: an identity is there when its key is.
    write_private(&paths.key, &key.serialize_pem())?;
    Ok(issue_token(state, lifetime)?)
}

/// Another token; only on the host that holds the authority's key.
pub fn issue_token(state: &Path, lifetime: Duration) -> Result<Token, IdentityError> {
    let files = IdentityFiles::of(state);
    if !files.ca_key().exists() {
        return Err(IdentityError::NoAuthority);
    }
    let fingerprint = fingerprint_of_pem(&IdentityFiles::read(&files.paths().ca)?)?;
    TokenStore::of(state).issue(&fingerprint, lifetime)
}

/// Refuses a state directory that belongs to a host of a cluster.
pub fn refuse_second_identity(state: &Path) -> Result<(), AgentError> {
    if IdentityFiles::of(state).exists() {
        return Err(ApiError::conflict(format!(
            "{} holds the identity of a host already; choose another --state",
            state.display()
        ))
        .into());
    }
    Ok(())
}

/// Makes this host one of the cluster that `address` belongs to. The private key is made here and stays here.
pub async fn join(
    state: &Path,
    config: &Config,
    address: SocketAddr,
    token: &Token,
) -> Result<JoinAnswer, AgentError> {
    config.check()?;
    let files = IdentityFiles::of(state);
    refuse_second_identity(state)?;
    let key = host_key()?;
    let request = JoinRequest {
        token: token.secret.clone(),
        name: config.name.clone(),
        address: config.listen.to_string(),
        csr_pem: signing_request(&config.name, &key)?,
    };
    let answer = ask_to_join(address, token, &request).await?;
    if fingerprint_of_pem(&answer.ca_pem)? != token.fingerprint || answer.hosts.len() > MAX_HOSTS {
        return Err(
            ApiError::unreachable(format!("{address} answered with another cluster's authority")).into()
        );
    }
    super::make_private_dir(state)?;
    files.create_dir()?;
    let paths = files.paths();
    write_private(&paths.ca, &answer.ca_pem)?;
    write_private(&paths.cert, &answer.cert_pem)?;
    let others = answer.hosts.iter().filter(|host| host.name != config.name);
    let hosts = others.map(|host| (host.name.clone(), host.address.clone())).collect();
    HostsStore::of(state).save(&hosts)?;
    config.save(state)?;
    // Last: an identity is there when its key is.
    write_private(&paths.key, &key.serialize_pem())?;
    Ok(answer)
}

async fn ask_to_join(
    address: SocketAddr,
    token: &Token,
    request: &JoinRequest,
) -> Result<JoinAnswer, ApiError> {
    let unreachable = |why: String| {
        ApiError::unreachable(format!(
            "cannot reach the first host's agent at {address}: {why}; is `vmove agent` running there?"
        ))
    };
    let exchange = async {
        let tls = joining_client(&token.fingerprint)?;
        let tcp = TcpStream::connect(address).await.map_err(|e| unreachable(e.to_string()))?;
        let name = ServerName::IpAddress(address.ip().into());
        let stream = TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.map_err(|e| {
            ApiError::unreachable(format!(
                "{address} did not prove to be of the cluster the token is for: {e}"
            ))
        })?;
        let mut sender = peers::handshake(stream).await.map_err(unreachable)?;
        let body =
            serde_json::to_vec(request).map_err(|e| ApiError::internal(format!("cannot write JSON: {e}")))?;
        let request = Request::post("/v1/join")
            .header(HOST, address.to_string())
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .map_err(|e| ApiError::internal(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| unreachable(e.to_string()))?;
        peers::answer(response, &format!("joining at {address}")).await
    };
    tokio::time::timeout(peers::LONG, exchange)
        .await
        .unwrap_or_else(|_| Err(unreachable("no answer".to_owned())))
}

impl Agent {
    /// Lets a host in that brings a valid token: signs its certificate, notes its address, tells the others.
    pub async fn admit(self: &Arc<Self>, request: JoinRequest) -> Result<JoinAnswer, ApiError> {
        check_host_name(&request.name)?;
        let address: SocketAddr = request
            .address
            .parse()
            .map_err(|_| ApiError::invalid(format!("{:?} is not IP:PORT", request.address)))?;
        if address.ip().is_unspecified() {
            return Err(ApiError::invalid("name the IP address that other hosts reach the new one at"));
        }
        let agent = self.clone();
        let (new, answer) = blocking(move || agent.sign_in(&request, address.ip())).await?;
        tracing::info!(host = new.name, address = new.address, "host has joined");
        let agent = self.clone();
        tokio::spawn(async move {
            for host in agent.peers.all().keys().filter(|host| **host != new.name) {
                agent.tell(host, &new).await;
            }
        });
        Ok(answer)
    }

    fn sign_in(&self, request: &JoinRequest, ip: IpAddr) -> Result<(HostAddress, JoinAnswer), ApiError> {
        // One at a time: of two hosts with one name the second must see the first.
        static ADMITTING: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _one = ADMITTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let tokens = TokenStore::of(&self.state);
        // Before anything else is said to somebody without a certificate.
        tokens.check(&request.token)?;
        let known = self.peers.all();
        let same = |name: &String| name.eq_ignore_ascii_case(&request.name);
        if request.name.eq_ignore_ascii_case(&self.config.name) || known.keys().any(same) {
            return Err(ApiError::name_taken(format!(
                "the cluster has a host {:?} already; choose another --name",
                request.name
            )));
        }
        if self.peers.removed().names.iter().any(same) {
            return Err(ApiError::name_taken(format!(
                "a host {:?} was removed from the cluster, and its certificate bears that name for ever; choose another --name",
                request.name
            )));
        }
        if !self.identity.ca_key().exists() {
            return Err(IdentityError::NoAuthority.into());
        }
        let ca_pem = IdentityFiles::read(&self.identity.paths().ca)?;
        let authority = Authority::open(&ca_pem, &IdentityFiles::read(&self.identity.ca_key())?)?;
        let cert_pem = authority.issue_for_request(&request.name, ip, &request.csr_pem)?;
        tokens.redeem(&request.token)?;
        let new = HostAddress { name: request.name.clone(), address: request.address.clone() };
        self.peers.learn(&new)?;
        let mut hosts = vec![self.own_address()];
        hosts.extend(known.into_iter().map(|(name, address)| HostAddress { name, address }));
        Ok((new, JoinAnswer { cert_pem, ca_pem, hosts }))
    }

    fn own_address(&self) -> HostAddress {
        HostAddress { name: self.config.name.clone(), address: self.config.listen.to_string() }
    }

    async fn tell(&self, host: &str, of: &HostAddress) {
        let told: Result<(), ApiError> =
            self.peers.call(host, Method::PUT, "/v1/hosts", Some(of), peers::SHORT).await;
        if let Err(error) = told {
            tracing::debug!(host, %error, "cannot tell of a host; it will ask");
        }
    }

    /// Another host tells of a host. Only a host itself may change its address.
    pub fn hear_of(&self, from: &str, host: &HostAddress) -> Result<(), ApiError> {
        check_host_name(&host.name)?;
        let address: SocketAddr = host
            .address
            .parse()
            .map_err(|_| ApiError::invalid(format!("{:?} is not IP:PORT", host.address)))?;
        let known = self.peers.all();
        if address.ip().is_unspecified() || known.len() >= MAX_HOSTS {
            return Err(ApiError::invalid("this is not a host that can be called"));
        }
        if known.contains_key(&host.name) && !from.eq_ignore_ascii_case(&host.name) {
            return Ok(());
        }
        self.peers.learn(host)
    }

    /// Tells the others of this host's address, and asks them for hosts this one has not heard of; until the agent ends.
    pub(super) async fn gossip(self: Arc<Self>) {
        loop {
            let own = self.own_address();
            for host in self.peers.all().keys() {
                let path = "/v1/hosts?probe=false";
                let theirs: Result<Vec<KnownHost>, ApiError> =
                    self.peers.call(host, Method::GET, path, None::<&()>, peers::SHORT).await;
                let Ok(theirs) = theirs else { continue };
                // First: a host that was removed is not to be learned of again.
                self.keep_in_mind(host).await;
                self.tell(host, &own).await;
                for other in theirs.into_iter().take(MAX_HOSTS).filter(|other| !other.this) {
                    let other = HostAddress { name: other.name, address: other.address };
                    if let Err(error) = self.hear_of(host, &other) {
                        tracing::warn!(host, %error, "told of a host that cannot be");
                    }
                }
            }
            if !self.pause(GOSSIP_INTERVAL).await {
                return;
            }
        }
    }

    /// This host and all it knows; with `probe`, whether each answers and what it says.
    pub async fn known_hosts(&self, probe: bool) -> Result<Vec<KnownHost>, ApiError> {
        let own = KnownHost {
            name: self.config.name.clone(),
            address: self.config.listen.to_string(),
            reachable: true,
            this: true,
            info: if probe { Some(self.host_info()?) } else { None },
            error: None,
        };
        let mut hosts = vec![own];
        for (name, address) in self.peers.all() {
            hosts.push(KnownHost { name, address, reachable: false, this: false, info: None, error: None });
        }
        if probe {
            let answers = self.peers.ask_all::<HostInfo>("/v1/host", PROBE_DEADLINE).join_all().await;
            for (name, answer) in answers {
                let Some(host) = hosts.iter_mut().find(|host| host.name == name) else { continue };
                match answer {
                    Ok(info) => (host.reachable, host.info) = (true, Some(info)),
                    Err(error) => host.error = Some(error.message),
                }
            }
        }
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(hosts)
    }
}
