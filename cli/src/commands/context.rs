//! `vmove context`: names for clusters; and `vmove dial`, the far end of a context that goes through ssh.

use tokio::io::AsyncWriteExt;

use super::CommandError;
use crate::client::contexts::{Contexts, LOCAL};
use crate::client::{self, Address, ClientError};
use crate::render;
use crate::render::table::{Align, Table};

/// What to do with contexts.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum ContextCommand {
    /// List the contexts; the chosen one is marked
    Ls(super::hosts::JsonArgs),
    /// Name a cluster by one of its agents
    Add(AddArgs),
    /// Choose a context for all commands to come; 'local' is the agent of this machine
    Use(NameArgs),
    /// Forget a context
    Rm(NameArgs),
}

/// Arguments of `vmove context add`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct AddArgs {
    /// The context's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// An agent of the cluster: ssh://[USER@]HOST[:PORT] (that machine has vmove, and USER may use its agent), or the path of a socket
    #[arg(value_name = "ADDRESS", value_parser = address)]
    pub address: Address,
}

/// A context by its name.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct NameArgs {
    /// The context's name
    #[arg(value_name = "NAME")]
    pub name: String,
}

fn address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|e: ClientError| e.to_string())
}

impl ContextCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<(), CommandError> {
        let mut contexts = Contexts::load()?;
        match self {
            Self::Ls(args) => return list(&contexts, args.json),
            Self::Add(args) => {
                vmove_storage::datastore::check_name("context", &args.name).map_err(CommandError::failed)?;
                if args.name == LOCAL {
                    return Err(CommandError::Usage(format!(
                        "{LOCAL:?} is the agent of this machine; choose another name"
                    )));
                }
                contexts.add(&args.name, &args.address)?;
            }
            Self::Use(args) => contexts.choose(&args.name)?,
            Self::Rm(args) => contexts.remove(&args.name)?,
        }
        Ok(())
    }
}

fn list(contexts: &Contexts, as_json: bool) -> Result<(), CommandError> {
    if as_json {
        let all: Vec<_> = contexts
            .list()
            .map(|(name, address, current)| {
                serde_json::json!({ "name": name, "address": address, "current": current })
            })
            .collect();
        return Ok(render::print_json(&all)?);
    }
    let mut table = Table::new(&[("", Align::Left), ("NAME", Align::Left), ("ADDRESS", Align::Left)]);
    let mark = |current: bool| if current { "*" } else { "" }.to_owned();
    table.row([mark(contexts.current().is_none()), LOCAL.to_owned(), "the agent of this machine".to_owned()]);
    for (name, address, current) in contexts.list() {
        table.row([mark(current), name.to_owned(), address.to_owned()]);
    }
    Ok(render::print(&table.render())?)
}

/// Passes bytes between standard input and output and this machine's agent, until either ends.
pub async fn dial() -> Result<(), CommandError> {
    let socket = client::local()?;
    let stream = client::connect_unix(&socket)
        .await
        .map_err(|source| ClientError::Connect { address: Address::Unix(socket), source })?;
    let (mut from, mut to) = stream.into_split();
    let asked = async {
        tokio::io::copy(&mut tokio::io::stdin(), &mut to).await?;
        to.shutdown().await?;
        // The answer may still come.
        std::future::pending::<std::io::Result<()>>().await
    };
    let answered = async {
        let mut out = tokio::io::stdout();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = tokio::io::AsyncReadExt::read(&mut from, &mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            out.write_all(&buffer[..n]).await?;
            // A console's key must not wait for more.
            out.flush().await?;
        }
    };
    tokio::select! {
        ended = asked => Ok(ended?),
        ended = answered => Ok(ended.map_err(|e: std::io::Error| e)?),
    }
}
