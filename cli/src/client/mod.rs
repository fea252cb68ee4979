//! A client of the agent's HTTP API over its unix socket, for commands, the demo, the benchmark and tests.
//!
//! Lives here: connections, requests, errors, following a move, staying with a console. Never enters: rendering, decisions about exit codes.

pub mod attachment;
mod console;
mod discover;
mod error;
mod follow;
mod http;
mod socket;

pub use console::{Console, ConsoleEvent};
pub use discover::{DEFAULT_SOCKETS, discover};
pub use error::ClientError;
pub use http::{Client, ConsoleStream};
pub use socket::connect_unix;
