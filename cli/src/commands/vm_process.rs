//! `vmove vm-process` (hidden): the process of one VM, started by its agent.
//!
//! Lives here: the way into `vmove-compute` and the note of a failure for the agent. Never enters: an async runtime, which a VM
//! process does not need.

use std::path::PathBuf;

use super::CommandError;

/// File in the VM's directory in which a process that failed says why.
const ERROR_FILE: &str = "error.txt";

/// Arguments of the hidden command.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct VmProcessArgs {
    /// The VM's directory
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

impl VmProcessArgs {
    /// Runs the VM to its end. Ends in success when it was stopped, powered off or moved away.
    pub fn run(&self) -> Result<(), CommandError> {
        let Err(error) = vmove_compute::process::run(&self.dir) else { return Ok(()) };
        if let Err(unwritten) = std::fs::write(self.dir.join(ERROR_FILE), format!("{error}\n")) {
            eprintln!("vmove: cannot leave a note of the failure for the agent: {unwritten}");
        }
        Err(CommandError::failed(error))
    }
}
