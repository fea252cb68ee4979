//! Placeholder header, replaced as the crate is written.

pub mod boot;
pub mod kvm;
pub mod machine;
pub mod memory;
