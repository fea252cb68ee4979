//! The `vmove` program, built for this package's tests. Nothing of its own: the very main of `vmove`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vmove::commands::main(std::env::args_os())
}
