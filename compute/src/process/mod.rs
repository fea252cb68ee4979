//! The per-VM process: one process owns one VM, so an agent can restart under running VMs.
//!
//! | module | |
//! |---|---|
//! | [`protocol`] | what agent and process say to each other |
//! | `owner` | the process's main thread: boot or arrival, moves, the end |
//! | `control` | the socket on which the agent asks |
//! | [`console`] | the guest's serial console and its watchers |
//! | [`measure`] | watching a running VM for an estimate |
//! | `networks` | from a VM's definition to its machine's interfaces |
//!
//! Never enters: many VMs, users, policy.

pub mod console;
mod control;
pub mod measure;
pub(crate) mod networks;
mod owner;
pub mod protocol;

pub use owner::{ProcessError, run};
