//! Whole-system tests of vmove: real agents, real VM processes, real KVM, driven as a user drives them.
//!
//! | module | what lives there |
//! |---|---|
//! | [`cluster`] | hosts on this machine: `init`, `join`, agents, and the end of all they started |
//! | [`guest`] | VMs of the fixture guest: made, moved, and where they run |
//! | [`linux`] | the Linux guest: built, made, booted, its file system afterwards |
//! | [`clients`] | users of a guest: ping, SSH, echoed streams, downloads |
//! | [`console`] | what the guest says, parsed, waited for |
//! | [`stops`] | holding a move between two of its steps |
//! | [`faults`] | disks that fail on demand |
//! | [`relay`] | standing between the two sides of a move: cutting, holding, damaging its connections |
//! | [`runners`] | the watch for two runners of one VM |
//! | [`machine`] | machines as a newcomer has them, with a shell to type into |
//! | [`netns`] | hosts with networks of their own, joined by a switch |
//! | [`processes`] | processes of a test, by their command lines |
//! | [`peer`] | TLS connections of friends and strangers to an agent |
//! | [`images`] | what `qemu-img` and the file system say of images |
//! | [`model`] | the ownership rule in a world so small that every state of it is visited |
//! | [`decoders`], [`seeds`] | every decoder of bytes from outside, and valid bytes for each |
//! | [`sim`] | the simulator: the engine, journal and failure table in a world that fails |
//! | [`clusters`] | generated clusters for the planner, and the watch over a plan |
//! | [`wait`], [`kvm`] | waiting for events; what this machine lacks |
//!
//! Never enters: short cuts into the product. What a test changes or asks goes through the command line, the sockets or the files
//! a user has too.
#![forbid(unsafe_code)]

pub mod clients;
pub mod cluster;
pub mod clusters;
pub mod console;
pub mod decoders;
pub mod faults;
pub mod guest;
pub mod images;
pub mod kvm;
pub mod linux;
pub mod machine;
pub mod model;
pub mod netns;
pub mod peer;
pub mod processes;
pub mod relay;
pub mod runners;
pub mod seeds;
pub mod sim;
pub mod stops;
pub mod wait;
