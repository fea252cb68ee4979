//! The networks of VMs: what a definition may say of them, MAC addresses for those without, and whether this host has what one needs.
//!
//! Never enters: taps and packets; the VM processes have them.

use std::collections::BTreeSet;

use vmove_compute::net::{Attachment, MacAddress};

use super::Agent;
use super::error::ApiError;
use crate::api::types::{NetworkDefinition, VmDefinition};

/// Most networks of a VM.
const MAX_NETWORKS: usize = 8;
/// Longest name of an interface of the host (IFNAMSIZ in linux/if.h, less the zero).
const MAX_INTERFACE_NAME: usize = 15;

/// Checks the networks of a definition, from a user or another host; gives the first mistake in words.
pub fn check(networks: &[NetworkDefinition]) -> Result<(), String> {
    if networks.len() > MAX_NETWORKS {
        return Err(format!("{} networks; at most {MAX_NETWORKS} are possible", networks.len()));
    }
    let (mut names, mut macs) = (BTreeSet::new(), BTreeSet::new());
    for network in networks {
        let name = &network.name;
        vmove_storage::datastore::check_name("network", name).map_err(|e| e.to_string())?;
        if !names.insert(name) {
            return Err(format!("network {name:?} is there twice"));
        }
        let Some(Attachment::Bridge(interface) | Attachment::Tap(interface)) = network.attachment() else {
            return Err(format!("network {name:?} needs a bridge or a tap, and not both"));
        };
        if !is_interface_name(&interface) {
            return Err(format!("network {name:?}: {interface:?} cannot be an interface's name"));
        }
        let Some(mac) = network.mac else {
            return Err(format!("network {name:?} has no MAC address"));
        };
        if !macs.insert(mac) {
            return Err(format!("network {name:?}: MAC address {mac} is there twice"));
        }
    }
    Ok(())
}

/// What the kernel takes as a name (net/core/dev.c, `dev_valid_name`), without the `%` it would put a number for.
fn is_interface_name(name: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    (1..=MAX_INTERFACE_NAME).contains(&name.len()) && name != "." && name != ".." && !name.contains(odd)
}

impl Agent {
    /// Gives an address to each network that has none: random, locally administered, and no VM's of this host.
    pub(super) fn fill_macs(&self, definition: &mut VmDefinition) -> Result<(), ApiError> {
        let mut taken: BTreeSet<MacAddress> = self.macs()?.into_iter().map(|(mac, _)| mac).collect();
        taken.extend(definition.networks.iter().filter_map(|network| network.mac));
        for network in definition.networks.iter_mut().filter(|network| network.mac.is_none()) {
            let mac = std::iter::repeat_with(random_mac).find(|mac| !taken.contains(mac));
            taken.extend(mac);
            network.mac = mac;
        }
        Ok(())
    }

    /// Networks of a VM whose address another VM of this host has.
    pub(super) fn taken_macs(&self, definition: &VmDefinition) -> Result<Vec<String>, ApiError> {
        let known = self.macs()?;
        let taken = definition.networks.iter().filter_map(|network| {
            let other =
                |(mac, vm): &&(MacAddress, String)| Some(*mac) == network.mac && *vm != definition.name;
            let (mac, vm) = known.iter().find(other)?;
            Some(format!(
                "network {}: MAC address {mac} is that of VM {vm} on host {}",
                network.name, self.config.name
            ))
        });
        Ok(taken.collect())
    }

    /// Everything about a VM's networks that keeps it from running on this host: what its taps need is really tried.
    pub(super) fn network_blockers(&self, definition: &VmDefinition) -> Result<Vec<String>, ApiError> {
        let mut blockers = self.taken_macs(definition)?;
        for network in &definition.networks {
            let Some(attachment) = network.attachment() else { continue };
            if let Err(error) = attachment.check() {
                blockers.push(format!("network {}: host {}: {error}", network.name, self.config.name));
            }
        }
        Ok(blockers)
    }

    /// The addresses of all VMs of this host, running or not. A definition that cannot be read is somebody else's complaint.
    fn macs(&self) -> Result<Vec<(MacAddress, String)>, ApiError> {
        let mut macs = Vec::new();
        for name in self.registry.names()? {
            let definition = self.registry.vm(&name)?.definition();
            let networks = definition.map(|definition| definition.networks).unwrap_or_default();
            macs.extend(networks.iter().filter_map(|network| Some((network.mac?, name.clone()))));
        }
        Ok(macs)
    }
}

fn random_mac() -> MacAddress {
    let [a, b, c, d, e, f, ..] = *uuid::Uuid::new_v4().as_bytes();
    MacAddress::local([a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str) -> NetworkDefinition {
        NetworkDefinition {
            name: name.into(),
            bridge: Some("br0".into()),
            tap: None,
            mac: Some(MacAddress::local([0, 1, 2, 3, 4, name.len() as u8])),
        }
    }

    #[test]
    fn mistakes_are_named() {
        let good = [network("a"), network("bc")];
        assert_eq!(check(&good), Ok(()));
        type Mistake = (&'static str, fn(&mut [NetworkDefinition]));
        let mistakes: [Mistake; 9] = [
            ("twice", |n| n[1].name = "a".into()),
            ("twice", |n| n[1].mac = n[0].mac),
            ("no MAC", |n| n[0].mac = None),
            ("not both", |n| n[0].bridge = None),
            ("not both", |n| n[0].tap = Some("tap0".into())),
            ("x/y", |n| n[0].name = "x/y".into()),
            ("cannot be", |n| n[0].bridge = Some("a-name-too-long-".into())),
            ("cannot be", |n| n[0].bridge = Some("br%d".into())),
            ("cannot be", |n| n[0].bridge = Some(String::new())),
        ];
        for (words, mistake) in mistakes {
            let mut networks = good.clone();
            mistake(&mut networks);
            let said = check(&networks).unwrap_err();
            assert!(said.contains(words), "{said} lacks {words}");
        }
        let many: Vec<_> = (1..=9).map(|n| network(&"x".repeat(n))).collect();
        assert!(check(&many).unwrap_err().contains("at most"));
    }
}
