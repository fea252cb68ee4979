//! vmove: shared-nothing live migration for KVM, as a library for its binary and for whole-system tests.
//!
//! Lives here: commands, the per-host agent and its API, placement, identity, rendering. Never enters: guest bytes.
#![forbid(unsafe_code)]

pub mod agent;
pub mod api;
pub mod bench;
pub mod client;
pub mod commands;
pub mod definition;
pub mod demo;
pub mod evacuation;
pub mod identity;
pub mod placement;
pub mod render;
