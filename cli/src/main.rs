//! The `vmove` program. Everything is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vmove::commands::main(std::env::args_os())
}
