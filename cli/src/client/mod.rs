//! A client of the agent's HTTP API over its unix socket, for commands, the demo, the benchmark and tests.
//!
//! Lives here: finding the agent, connections, requests, errors, following a move, staying with a console. Never enters: rendering, decisions about exit codes.

mod address;
pub mod attachment;
mod console;
pub mod contexts;
mod discover;
mod error;
mod follow;
mod http;
mod socket;

pub use address::Address;
pub use console::{Console, ConsoleEvent};
pub use discover::{discover, local};
pub use error::ClientError;
pub use http::{Client, ConsoleStream};
pub use socket::connect_unix;
