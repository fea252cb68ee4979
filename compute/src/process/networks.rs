//! The networks of a VM's definition as its machine has them.
//!
//! Never enters: whether they are there.

use super::protocol::VmDefinition;
use crate::machine::{Error, NetConfig};

/// What the machine of `vm` is attached to.
///
/// # Errors
/// [`Error::Config`] if the definition leaves something open that its host's agent has filled in or refused.
pub fn configs(vm: &VmDefinition) -> Result<Vec<NetConfig>, Error> {
    let config = |network: &super::protocol::NetworkDefinition| {
        let (Some(attachment), Some(mac)) = (network.attachment(), network.mac) else {
            return Err(Error::Config(format!("network {} lacks a bridge or tap, or a MAC", network.name)));
        };
        Ok(NetConfig { name: network.name.clone(), mac, attachment, owner: vm.name.clone() })
    };
    vm.networks.iter().map(config).collect()
}
