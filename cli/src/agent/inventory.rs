//! What this host has and carries, and the same of all hosts, for the placement of VMs.
//!
//! Never enters: where a VM goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::error::{ApiError, blocking};
use super::{Agent, peers, process};
use crate::api::placement::{ClusterInventory, HostInventory, InventoryVm};
use crate::api::types::{VmDefinition, VmDetail, VmSummary};

/// A VM of which nothing is known but its name.
fn unreadable(summary: VmSummary) -> VmDetail {
    let definition = VmDefinition {
        name: summary.name.clone(),
        vcpus: summary.vcpus,
        memory_mib: summary.memory_mib,
        cmdline: String::new(),
        cpu_features: Vec::new(),
        disks: Vec::new(),
        networks: Vec::new(),
        apart: Vec::new(),
    };
    VmDetail { summary, definition, pid: None }
}

impl Agent {
    /// This host. A VM whose files cannot be read is in it as failed: the host is not empty.
    pub async fn inventory(self: &Arc<Self>) -> Result<HostInventory, ApiError> {
        let mut vms = Vec::new();
        for name in self.registry.names()? {
            match self.view(&name).await {
                Ok(Some(view)) => vms.push(self.detail(&view)),
                Ok(None) => {}
                Err(error) => vms.push(unreadable(self.unreadable(name, error.message))),
            }
        }
        let agent = self.clone();
        blocking(move || {
            let vms = vms.into_iter().map(|vm| {
                let images = vm.summary.disks.iter().filter_map(|disk| {
                    // An image that is still being made has no size yet.
                    let info = vmove_storage::info(&disk.path).ok()?;
                    Some((disk.name.clone(), info.allocated_bytes))
                });
                let disk_bytes = images.collect();
                let touched_bytes = vm.pid.and_then(process::touched);
                InventoryVm { vm, disk_bytes, touched_bytes }
            });
            let vms = vms.collect();
            let interfaces = nix::net::if_::if_nameindex()
                .map_err(|e| ApiError::internal(format!("cannot list network interfaces: {e}")))?;
            let interfaces = interfaces.iter().map(|one| one.name().to_string_lossy().into_owned());
            Ok(HostInventory {
                interfaces: interfaces.collect(),
                host: agent.host_info()?,
                vms,
                maintenance: agent.maintenance.get(),
            })
        })
        .await
    }

    /// All hosts.
    pub async fn cluster_inventory(self: &Arc<Self>) -> Result<ClusterInventory, ApiError> {
        let asked = self.peers.ask_all::<HostInventory>("/v1/inventory", peers::SHORT);
        let mut hosts = vec![self.inventory().await?];
        let mut unreachable = BTreeMap::new();
        for (host, answer) in asked.join_all().await {
            match answer {
                // A host speaks for itself alone.
                Ok(theirs) if theirs.host.name == host => hosts.push(theirs),
                Ok(theirs) => drop(unreachable.insert(host, format!("it calls itself {}", theirs.host.name))),
                Err(error) => drop(unreachable.insert(host, error.message)),
            }
        }
        hosts.sort_by(|a, b| a.host.name.cmp(&b.host.name));
        Ok(ClusterInventory { hosts, unreachable })
    }
}
