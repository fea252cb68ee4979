//! The section that says which machine a saved state is of, so that it meets only its like.
//!
//! What never enters: the states of the parts.

use serde::{Deserialize, Serialize};
use vmove_devices::state::{Section, Sections};

use super::{Error, Machine, MachineConfig};

const SECTION: &str = "machine";
const VERSION: u16 = 1;

/// What must be the same on both sides and shows in no other section.
#[derive(Serialize, Deserialize)]
struct MachineState {
    vcpus: u8,
    memory_bytes: u64,
}

pub(super) fn machine_section(machine: &Machine) -> Result<Section, Error> {
    let state = MachineState { vcpus: machine.vcpus(), memory_bytes: machine.ram().layout().bytes() };
    Ok(Section::encode(SECTION, VERSION, &state)?)
}

pub(super) fn check_machine(config: &MachineConfig, sections: &mut Sections) -> Result<(), Error> {
    let state: MachineState = sections.take(SECTION, VERSION)?;
    let same = |what, saved, here| {
        if saved == here { Ok(()) } else { Err(Error::Mismatch { what, saved, here }) }
    };
    same("vCPUs", u64::from(state.vcpus), u64::from(config.vcpus))?;
    same("bytes of RAM", state.memory_bytes, config.memory_bytes)
}
