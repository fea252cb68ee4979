//! Taking a host that is gone for ever out of the cluster.
//!
//! Its name goes on a list that every agent keeps and passes on: who is on it is asked nothing, may ask nothing, and cannot be learned
//! of again; a new host cannot take the name, since the old one's certificate bears it. Nothing is decided about VMs: those that wait
//! for it are for a person to take over (recover).
//! Lives here: what a removal would give up, who must agree, the list and its spreading. Never enters: ownership.

use std::collections::BTreeSet;
use std::sync::Arc;

use hyper::Method;

use super::error::{ApiError, blocking};
use super::{Agent, peers};
use crate::api::recovery::HostStanding;
use crate::api::removal::{HostRemoval, HostTies, RemovedHosts, TiedVm};
use crate::api::types::{HostInfo, VmList};
use crate::identity::check_host_name;

/// Most names on the list; more from another agent is not believed.
const MAX_REMOVED: usize = 65_536;

impl Agent {
    /// What it would mean to remove a host, by the word of all that answer.
    pub async fn removal_of(self: &Arc<Self>, host: &str) -> Result<HostRemoval, ApiError> {
        if host == self.config.name {
            return Err(ApiError::conflict(format!(
                "{host:?} is the host that was asked: ask another one to remove it"
            )));
        }
        self.peers.address(host)?;
        let mut removal = HostRemoval {
            host: host.to_owned(),
            given_up: Vec::new(),
            waiting: Vec::new(),
            unreachable: Vec::new(),
            authority_lost: true,
            blockers: Vec::new(),
        };
        let path = format!("/v1/hosts/{host}/ties");
        let asked = self.peers.ask_all::<HostTies>(&path, peers::LONG);
        let mut accounts = vec![(self.config.name.clone(), self.ties_to(host).await)];
        accounts.extend(asked.join_all().await.into_iter().filter(|(other, _)| other != host));
        let mut given_up = BTreeSet::new();
        for (other, account) in accounts {
            let Ok(ties) = account else {
                removal.unreachable.push(other);
                continue;
            };
            if ties.reachable {
                removal.blockers.push(format!(
                    "host {host} answers host {other}: move its VMs away and end its agent first"
                ));
            }
            removal.authority_lost &= !ties.authority;
            given_up.extend(ties.seen);
            removal.waiting.extend(ties.waiting);
        }
        let elsewhere = self.vms_elsewhere(host).await;
        removal.given_up = given_up.into_iter().filter(|vm| !elsewhere.contains(vm)).collect();
        removal.unreachable.sort();
        Ok(removal)
    }

    /// VMs on all hosts that answer, without `host`.
    async fn vms_elsewhere(self: &Arc<Self>, host: &str) -> BTreeSet<String> {
        let mut found: BTreeSet<String> = self.registry.names().unwrap_or_default().into_iter().collect();
        for (other, list) in self.peers.ask_all::<VmList>("/v1/vms", peers::SHORT).join_all().await {
            if let (true, Ok(list)) = (other != host, list) {
                found.extend(list.vms.into_iter().map(|vm| vm.name));
            }
        }
        found
    }

    /// What this host has to do with another one.
    pub async fn ties_to(self: &Arc<Self>, host: &str) -> Result<HostTies, ApiError> {
        let info: Result<HostInfo, ApiError> =
            self.peers.call(host, Method::GET, "/v1/host", None::<&()>, peers::CONNECT_DEADLINE).await;
        let mut waiting = Vec::new();
        for vm in self.registry.names()? {
            let held: HostStanding = self.standing(&vm, None).await?;
            if held.waits_for.as_deref() == Some(host) {
                waiting.push(TiedVm {
                    what: format!(
                        "{}; without host {host} it is decided by `vmove recover {vm} --take-ownership`",
                        held.next
                    ),
                    vm,
                    host: self.config.name.clone(),
                });
            }
        }
        Ok(HostTies {
            reachable: info.is_ok(),
            authority: self.identity.ca_key().exists(),
            seen: self.peers.seen(host),
            waiting,
        })
    }

    /// Removes a host that nobody reaches. Hosts that do not answer now learn of it when they are back.
    pub async fn remove_host(self: &Arc<Self>, host: &str) -> Result<HostRemoval, ApiError> {
        let removal = self.removal_of(host).await?;
        if !removal.blockers.is_empty() {
            return Err(ApiError::blocked(
                format!("host {host:?} is not to be removed from the cluster"),
                removal.blockers,
            ));
        }
        self.hear_of_removed(&self.config.name, RemovedHosts { names: [host.to_owned()].into() }).await?;
        let list = self.peers.removed();
        for other in self.peers.all().into_keys() {
            let told: Result<(), ApiError> =
                self.peers.call(&other, Method::PUT, "/v1/removed-hosts", Some(&list), peers::SHORT).await;
            if let Err(error) = told {
                tracing::debug!(other, %error, "not told of the removed host; it will ask");
            }
        }
        Ok(removal)
    }

    /// Whether a host was taken out of the cluster.
    pub fn is_removed(&self, host: &str) -> bool {
        self.peers.is_removed(host)
    }

    /// Hosts that were taken out of the cluster.
    pub fn removed_hosts(&self) -> RemovedHosts {
        self.peers.removed()
    }

    /// Takes in names of removed hosts from `told_by`; on disk when this returns.
    pub async fn hear_of_removed(
        self: &Arc<Self>,
        told_by: &str,
        hosts: RemovedHosts,
    ) -> Result<(), ApiError> {
        for name in &hosts.names {
            check_host_name(name)?;
        }
        let (agent, told_by) = (self.clone(), told_by.to_owned());
        blocking(move || {
            let list = agent.peers.removed();
            for host in hosts.names.difference(&list.names) {
                tracing::warn!(host, told_by, "host is out of the cluster");
            }
            if list.names.union(&hosts.names).count() > MAX_REMOVED {
                return Err(ApiError::invalid(
                    "more hosts are said to be removed than a cluster can have had",
                ));
            }
            agent.peers.remove(&hosts.names)
        })
        .await
    }

    /// Asks a host for what it knows of removed ones, and for its VMs, to be able to say what goes with it.
    pub(super) async fn keep_in_mind(self: &Arc<Self>, host: &str) {
        let removed: Result<RemovedHosts, ApiError> =
            self.peers.call(host, Method::GET, "/v1/removed-hosts", None::<&()>, peers::SHORT).await;
        if let Ok(removed) = removed
            && let Err(error) = self.hear_of_removed(host, removed).await
        {
            tracing::warn!(host, %error, "told of removed hosts that cannot be");
        }
        let vms: Result<VmList, ApiError> =
            self.peers.call(host, Method::GET, "/v1/vms", None::<&()>, peers::SHORT).await;
        if let Ok(vms) = vms {
            self.saw(host, &vms).await;
        }
    }

    /// Notes which VMs a host has.
    pub(super) async fn saw(self: &Arc<Self>, host: &str, vms: &VmList) {
        let names: BTreeSet<String> = vms.vms.iter().map(|vm| vm.name.clone()).collect();
        let (agent, host) = (self.clone(), host.to_owned());
        if let Err(error) = blocking(move || agent.peers.saw(&host, names)).await {
            tracing::debug!(%error, "which VMs other hosts have is not noted");
        }
    }
}
