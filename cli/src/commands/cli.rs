//! The command line: what can be said, and how the default action is found.
//!
//! Lives here: the clap structures. Never enters: what commands do.

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};

use super::agent::AgentArgs;
use super::balance::BalanceArgs;
use super::checkpoint::{CheckpointArgs, CheckpointsArgs, RestoreArgs};
use super::console::ConsoleArgs;
use super::context::ContextCommand;
use super::create::CreateArgs;
use super::edit::NewNameArgs;
use super::estimate::EstimateArgs;
use super::evacuate::EvacuateArgs;
use super::generate::GenerateArgs;
use super::hosts::{DatastoreCommand, HostCommand};
use super::image::ImageCommand;
use super::init::{InitArgs, TokenArgs};
use super::join::JoinArgs;
use super::move_vm::{MoveArgs, MoveIdArgs};
use super::recover::RecoverArgs;
use super::status::StatusArgs;
use super::stop::StopArgs;
use super::vm_process::VmProcessArgs;
use super::vms::{ListArgs, ShowArgs, VmArgs};
use crate::bench::BenchArgs;
use crate::demo::DemoArgs;

const USAGE: &str = "vmove <VM> [--host HOST] [--datastore DATASTORE] [--disk NAME=DATASTORE]... [OPTIONS]
       vmove <COMMAND>";

const AFTER: &str = "Moving is the default: 'vmove web1 --host b' moves the VM web1 to host b ('vmove move --help' lists the options).

Exit codes: 0 done; 1 refused or failed, the VM still runs where it was; 2 usage; 3 ownership undecided, see 'vmove recover';
130 cancelled.";

/// vmove: move running KVM virtual machines between hosts and datastores
#[derive(Debug, Parser)]
#[command(name = "vmove", version, override_usage = USAGE, after_help = AFTER, disable_help_subcommand = true)]
#[command(arg_required_else_help = true)]
pub struct Cli {
    /// The agent to talk to: its unix socket (or the directory it is in), or ssh://[USER@]HOST[:PORT] [default: that of the
    /// context, else this machine's]
    #[arg(long, global = true, value_name = "ADDRESS", env = "VMOVE_AGENT", hide_env_values = true)]
    pub agent: Option<String>,
    /// The cluster to talk to, as named with 'vmove context' [default: the one chosen with 'vmove context use']
    #[arg(long, global = true, value_name = "NAME", env = "VMOVE_CONTEXT", hide_env_values = true)]
    pub context: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a VM (the default when the first word is no command)
    #[command(
        override_usage = "vmove <VM> [--host HOST] [--datastore DATASTORE] [--disk NAME=DATASTORE]... [OPTIONS]"
    )]
    Move(MoveArgs),
    /// Make a VM
    Create(CreateArgs),
    /// Start a VM
    Start(VmArgs),
    /// Stop a VM: press its power button and wait until the guest has switched itself off
    Stop(StopArgs),
    /// Remove a stopped VM and its disks
    Rm(VmArgs),
    /// Change a stopped VM's definition in $EDITOR
    Edit(VmArgs),
    /// Give a stopped VM another name
    Rename(NewNameArgs),
    /// Copy a stopped VM: own disks and MAC addresses, the same everything else
    Clone(NewNameArgs),
    /// List VMs
    Ls(ListArgs),
    /// Show a VM
    Show(ShowArgs),
    /// Connect to a VM's serial console
    Console(ConsoleArgs),
    /// Keep this moment of a running VM: RAM, devices and disks
    Checkpoint(CheckpointArgs),
    /// List checkpoints, or remove one
    Checkpoints(CheckpointsArgs),
    /// Have a stopped VM go on from a checkpoint
    Restore(RestoreArgs),
    /// What a move would take: watches the VM and the way for a few seconds
    Estimate(EstimateArgs),
    /// How far a move is, or how it ended; without a name all moves of the cluster
    Status(StatusArgs),
    /// Give up a move
    Cancel(MoveIdArgs),
    /// Settle who owns a VM after a failure, and show who holds what of it
    Recover(RecoverArgs),
    /// Empty a host: move all its VMs to others, by a plan
    ///
    /// The moves are the agents': if this command is killed, those that have begun go on. Give it again, with the host or the plan, and it
    /// goes on too. Exit code 0: the host is empty; 1: something stays, and the report says why.
    Evacuate(EvacuateArgs),
    /// Suggest moves that even out RAM and CPUs over the hosts
    Balance(BalanceArgs),
    /// Run the agent of this host
    Agent(AgentArgs),
    /// Make a new cluster, of this host alone
    Init(InitArgs),
    /// Make a token with which another host can join (on the first host)
    Token(TokenArgs),
    /// Make this host one of a cluster
    Join(JoinArgs),
    /// Hosts
    #[command(subcommand)]
    Host(HostCommand),
    /// Datastores
    #[command(subcommand)]
    Datastore(DatastoreCommand),
    /// Names for clusters, and which one commands talk to
    #[command(subcommand)]
    Context(ContextCommand),
    /// Look at disk images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Two hosts, two datastores, one VM on this machine: watch it move
    Demo(DemoArgs),
    /// Measure moves against the limits of this machine
    Bench(BenchArgs),
    /// The process of one VM (started by the agent)
    #[command(hide = true)]
    VmProcess(VmProcessArgs),
    /// Write man pages and shell completions
    #[command(hide = true)]
    Generate(GenerateArgs),
    /// Passes standard input and output to this machine's agent (started through ssh by a context)
    #[command(hide = true)]
    Dial,
}

/// Parses the program's words. A first word that is no command is the name of a VM to move.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(with_default_command(words.into_iter().collect()))
}

/// The name is a command of the program, so a VM of this name could not be moved with `vmove <VM>`.
pub fn is_reserved(name: &str) -> bool {
    Cli::command().get_subcommands().any(|command| command.get_name() == name)
}

/// Inserts `move` where neither a command nor a request for help comes first.
fn with_default_command(mut words: Vec<OsString>) -> Vec<OsString> {
    let mut at = 1;
    while let Some(word) = words.get(at).and_then(|word| word.to_str()) {
        match word {
            "--agent" | "--context" => at += 2,
            _ if word.starts_with("--agent=") || word.starts_with("--context=") => at += 1,
            "-h" | "--help" | "-V" | "--version" => return words,
            _ if is_reserved(word) => return words,
            _ => break,
        }
    }
    if at < words.len() {
        words.insert(at, OsString::from("move"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_first_word_that_is_no_command_is_a_vm() -> Result<(), clap::Error> {
        for text in [
            "vmove web1 --host b",
            "vmove --host b web1",
            "vmove --agent /x web1 --host b",
            "vmove --agent=/x web1 --host=b",
            "vmove --context prod --agent=/x web1 --host=b",
            "vmove web1 --host b --agent /x",
            "vmove move web1 --host b",
        ] {
            let Command::Move(args) = parse(words(text))?.command else {
                panic!("{text} is a move");
            };
            assert_eq!((args.to.vm.as_str(), args.to.host.as_deref()), ("web1", Some("b")), "{text}");
        }
        assert!(matches!(parse(words("vmove --agent /x ls --json"))?.command, Command::Ls(_)));
        assert!(matches!(parse(words("vmove host ls"))?.command, Command::Host(_)));
        Ok(())
    }

    #[test]
    fn the_whole_contract_of_a_move_parses() -> Result<(), clap::Error> {
        let text = "vmove web1 --host b --datastore fast --disk vda=slow --disk vdb=fast --dry-run --json \
                    --max-downtime 50ms --bandwidth 1GiB/s --keep-source --audit --insecure-plain";
        let Command::Move(args) = parse(words(&text.replace("                    ", "")))?.command else {
            panic!("is a move");
        };
        assert_eq!(args.to.disk.len(), 2);
        assert_eq!(args.to.max_downtime.as_millis(), 50);
        assert_eq!(args.to.bandwidth, Some(1 << 30));
        assert!(
            args.dry_run
                && args.json
                && args.keep_source
                && args.audit
                && args.insecure_plain
                && !args.detach
        );
        Ok(())
    }

    #[test]
    fn command_names_are_reserved() {
        for name in ["ls", "move", "demo", "create"] {
            assert!(is_reserved(name), "{name}");
        }
        assert!(!is_reserved("web1"));
    }

    #[test]
    fn usage_errors_have_code_2_and_help_has_0() {
        let code = |text: &str| parse(words(text)).err().map(|e| e.exit_code());
        assert_eq!(code("vmove web1 --bandwidth fast"), Some(2));
        assert_eq!(code("vmove create"), Some(2));
        assert_eq!(code("vmove --help"), Some(0));
        assert_eq!(code("vmove --version"), Some(0));
    }
}
