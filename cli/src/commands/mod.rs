//! The commands of `vmove`, one file for each group, and how the program begins and ends.
//!
//! A command is a clap structure with a `run` that takes the client of the nearest agent where it needs one and ends in a
//! [`CommandError`] or not at all. Lives here: the way from words to requests, exit codes. Never enters: HTTP, guest bytes.

mod agent;
mod balance;
mod checkpoint;
mod cli;
mod confirm;
mod console;
mod context;
mod create;
mod destination;
mod edit;
mod error;
mod estimate;
mod evacuate;
mod generate;
mod host_args;
mod hosts;
mod image;
mod init;
mod join;
mod maintenance;
mod move_vm;
mod recover;
mod status;
mod stop;
mod vm_process;
mod vms;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

pub use cli::{Cli, Command, is_reserved, parse};
pub use error::CommandError;

use crate::client::{self, Client};

/// The whole program: words in, exit code out.
pub fn main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match parse(words) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed standard output is no reason for another code.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(cli: Cli) -> Result<(), CommandError> {
    let daemon = matches!(cli.command, Command::Agent(_) | Command::VmProcess(_));
    logging(if daemon { "info" } else { "warn" });
    let (agent, context) = (cli.agent, cli.context);
    match cli.command {
        Command::Image(image) => image.run(),
        Command::VmProcess(args) => args.run(),
        Command::Agent(args) => blocking(args.run()),
        Command::Context(args) => args.run(),
        Command::Generate(args) => args.run(),
        Command::Dial => blocking(context::dial()),
        Command::Init(args) => args.run(),
        Command::Token(args) => args.run(),
        Command::Join(args) => blocking(args.run()),
        Command::Demo(args) => blocking(async move { args.run().await }),
        Command::Bench(args) => blocking(async move { args.run().await }),
        // A mistyped command is taken for a VM: say so before looking for an agent.
        Command::Move(ref args) if args.to.is_nowhere() => Err(args.to.where_to()),
        command => blocking(async move {
            with_agent(command, &client::discover(agent.as_deref(), context.as_deref())?).await
        }),
    }
}

/// Commands that ask an agent.
async fn with_agent(command: Command, client: &Client) -> Result<(), CommandError> {
    match command {
        Command::Move(args) => args.run(client).await,
        Command::Create(args) => args.run(client).await,
        Command::Start(args) => args.start(client).await,
        Command::Stop(args) => args.run(client).await,
        Command::Rm(args) => args.remove(client).await,
        Command::Edit(args) => edit::edit(&args, client).await,
        Command::Rename(args) => args.rename(client).await,
        Command::Clone(args) => args.clone_vm(client).await,
        Command::Ls(args) => args.run(client).await,
        Command::Show(args) => args.run(client).await,
        Command::Console(args) => args.run(client).await,
        Command::Checkpoint(args) => args.run(client).await,
        Command::Checkpoints(args) => args.run(client).await,
        Command::Restore(args) => args.run(client).await,
        Command::Status(args) => args.run(client).await,
        Command::Cancel(args) => args.cancel(client).await,
        Command::Estimate(args) => args.run(client).await,
        Command::Recover(args) => args.run(client).await,
        Command::Evacuate(args) => args.run(client).await,
        Command::Balance(args) => args.run(client).await,
        Command::Host(command) => command.run(client).await,
        Command::Datastore(command) => command.run(client).await,
        Command::Image(_)
        | Command::Context(_)
        | Command::Dial
        | Command::Generate(_)
        | Command::Demo(_)
        | Command::Bench(_)
        | Command::VmProcess(_)
        | Command::Init(_)
        | Command::Token(_)
        | Command::Join(_)
        | Command::Agent(_) => unreachable!("these ask no agent"),
    }
}

/// Runs a command to its end on a runtime of its own. Threads that still wait for a keyboard are left behind.
fn blocking(command: impl Future<Output = Result<(), CommandError>>) -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}

/// Log lines go to standard error; `RUST_LOG` chooses more or fewer than `default`.
fn logging(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .finish();
    // A second call (tests) keeps the first subscriber.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
