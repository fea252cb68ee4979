//! The engine that makes a second machine equal to the first, memory and disks, and then lets exactly one of them run.
//!
//! Everything here is a pure function of the events it was given: `step(now, event) -> actions`. Two drivers run it: the real one
//! in `vmove-compute` (threads, rings, sockets, KVM) and tests that step it through virtual time.
//!
//! | module | what it decides |
//! |---|---|
//! | [`source`], [`committed`] | the side a VM leaves: phases, rounds, the commit; what is left to do after it |
//! | [`target`] | the side a VM reaches |
//! | [`precopy`] | another round, the switchover, or no convergence |
//! | [`predict`] | what a move would take, from measured rates |
//! | [`block`] | the mirror of one disk: background copy beside guest writes |
//! | [`journal`], [`recovery`] | who owns the VM, on disk; what to do with what is found there after a crash |
//! | [`wire`] | bytes between the two sides: hello, versions, frames, messages |
//! | [`ledger`] | what was sent and has arrived, so that a move goes on over new connections |
//! | [`pages`], [`digest`] | sets of pages; proofs that both sides hold the same |
//!
//! **Invariants.** No sockets, clocks, threads, files, KVM or unsafe code enter this crate. Every byte from outside is capped and
//! checked before it is believed. Each side changes its phase by a row of its table only ([`source::transitions`],
//! [`target::transitions`]). "Resume the source" is an action of [`source`] only: [`committed`] has no such action.

#![forbid(unsafe_code)]

pub mod block;
pub mod committed;
pub mod digest;
pub mod journal;
pub mod ledger;
pub mod pages;
pub mod precopy;
pub mod predict;
pub mod recovery;
pub mod source;
pub mod target;
mod transition;
pub mod wire;

#[cfg(test)]
mod pair_tests;

/// Virtual or real time in microseconds since some start; only differences count.
pub type Micros = u64;

/// Bytes of a guest page, the unit of RAM in a move.
pub const PAGE_BYTES: u64 = 4096;
