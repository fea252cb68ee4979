//! The saved state of a VM: the machine's sections and the console's, as one run of bytes.
//!
//! Lives here: what belongs into it. Never enters: RAM, disks, where the bytes go.

use vmove_devices::state;

use super::MoveError;
use crate::{
    machine::{Machine, PreparedMachine},
    process::console::Console,
};

/// The state of a paused machine and of its console, which takes no keys from now on until the guest goes on.
pub fn save(machine: &Machine, console: &Console) -> Result<Vec<u8>, MoveError> {
    let failed = |e: &dyn std::fmt::Display| MoveError::Machine(format!("save the state: {e}"));
    // The console first: a key is counted there and lies in the serial port, or neither.
    let mut sections = vec![console.save().map_err(|e| failed(&e))?];
    sections.extend(machine.save_state().map_err(|e| failed(&e))?);
    postcard::to_stdvec(&sections).map_err(|e| failed(&e))
}

/// Puts a saved state (untrusted) into a machine that waits for it, and into its console.
pub fn load(prepared: PreparedMachine, console: &Console, bytes: &[u8]) -> Result<Machine, MoveError> {
    let failed = |e: &dyn std::fmt::Display| MoveError::Machine(format!("load the saved state: {e}"));
    let mut sections = state::decode(bytes).map_err(|e| failed(&e))?;
    console.restore(&mut sections).map_err(|e| failed(&e))?;
    prepared.restore(sections).map_err(|e| failed(&e))
}
