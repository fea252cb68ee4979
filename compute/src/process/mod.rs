//! The per-VM process: one process owns one VM, so an agent can restart under running VMs.
//!
//! Lives here: its start, its control socket, its ownership of the machine. Never enters: many VMs, users, policy.

pub mod protocol;
