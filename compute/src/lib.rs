//! The VMM on KVM, and the process that runs one VM and drives its moves.

pub mod boot;
pub mod checkpoint;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod process;

pub use vmove_devices::net;
