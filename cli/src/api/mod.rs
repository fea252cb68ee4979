//! What the agent's HTTP API says, without how it is served.
//!
//! Lives here: request and response types, connections to unix sockets of any path length. Never enters: routes, policy.

pub mod checkpoint;
pub mod datastores;
pub mod definitions;
pub mod estimate;
pub mod placement;
pub mod recovery;
pub mod removal;
pub mod types;
pub mod watch;
