//! `vmove status`: one move, all moves of the cluster, or all of them again and again.

use std::io::IsTerminal;
use std::time::Duration;

use super::CommandError;
use super::move_vm::MoveIdArgs;
use crate::client::Client;
use crate::render;
use crate::render::screen::Screen;

/// How often the moves are looked at while they are watched.
const INTERVAL: Duration = Duration::from_millis(500);

/// Arguments of `vmove status`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct StatusArgs {
    /// A VM on the move, or the id of a move [default: all moves of the cluster]
    #[arg(value_name = "VM|MOVE", conflicts_with = "watch")]
    pub what: Option<String>,
    /// Show all moves of the cluster until 'q' is pressed; with --json a line whenever something changes
    #[arg(long)]
    pub watch: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl StatusArgs {
    /// Shows it.
    pub async fn run(self, client: &Client) -> Result<(), CommandError> {
        match (self.what, self.watch) {
            (Some(what), _) => MoveIdArgs { what, json: self.json }.status(client).await,
            (None, false) => {
                let list = client.moves().await?;
                if self.json {
                    return Ok(render::print_json(&list)?);
                }
                Ok(render::print(&render::screen::table(&list))?)
            }
            (None, true) if self.json => lines(client).await,
            (None, true) if std::io::stdout().is_terminal() => screen(client).await,
            (None, true) => Err(CommandError::Usage(
                "--watch draws on a terminal, and standard output is none; --watch --json prints lines"
                    .to_owned(),
            )),
        }
    }
}

/// A line of JSON for every change, for ever.
async fn lines(client: &Client) -> Result<(), CommandError> {
    let mut last = None;
    loop {
        let list = client.moves().await?;
        if last.as_ref() != Some(&list) {
            let line = serde_json::to_string(&list).map_err(|e| CommandError::failed(e.to_string()))?;
            render::print(&(line + "\n"))?;
            last = Some(list);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// The full screen, until a key ends it.
async fn screen(client: &Client) -> Result<(), CommandError> {
    let mut screen = Screen::open();
    loop {
        let seen = client.moves().await;
        // An agent that is being restarted is no reason to leave.
        screen.draw(seen.as_ref().map_err(|error| error.to_string()))?;
        let end = tokio::time::Instant::now() + INTERVAL;
        while tokio::time::Instant::now() < end {
            if Screen::asked_to_leave()? {
                return Ok(());
            }
            tokio::time::sleep(INTERVAL / 10).await;
        }
    }
}
