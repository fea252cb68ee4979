//! `vmove demo`: two hosts with two datastores each and one VM on this machine, moved three times under load, checked by the guest.
//!
//! - [`rig`]: two real agents in a temporary directory, and their removal
//! - [`guest`]: the lines the fixture guest writes on its console
//! - [`watch`]: following that console over moves
//! - [`script`]: what is shown
//!
//! Lives here: what a user would do by hand, done through the same commands and API. Never enters: short cuts into the agent.

mod error;
pub mod guest;
pub mod rig;
pub mod script;
pub mod watch;

pub use error::DemoError;

use tokio::signal::unix::{SignalKind, signal};

use crate::commands::CommandError;
use rig::Rig;

/// Arguments of `vmove demo`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct DemoArgs {
    /// Print one JSON object with the reports of all moves and the guest's own figures
    #[arg(long)]
    pub json: bool,
}

impl DemoArgs {
    /// Shows the demo; leaves nothing behind, also after Ctrl-C.
    pub async fn run(&self) -> Result<(), CommandError> {
        let outcome = with_rig("vmove-demo-", async |rig| script::play(rig).await).await?;
        outcome.print(self.json)?;
        outcome.judge()
    }
}

/// Runs `work` with a fresh pair of hosts and takes them down afterwards, whatever happened, Ctrl-C, SIGTERM and a closed terminal included.
pub async fn with_rig<T>(
    prefix: &str,
    work: impl AsyncFnOnce(&mut Rig) -> Result<T, DemoError>,
) -> Result<T, CommandError> {
    rig::check_kvm().map_err(CommandError::failed)?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut rig = Rig::new(prefix).map_err(CommandError::failed)?;
    let result = tokio::select! {
        result = work(&mut rig) => result.map_err(CommandError::failed),
        _ = interrupt.recv() => Err(CommandError::Cancelled("interrupted; cleaned up".to_owned())),
        _ = terminate.recv() => Err(CommandError::Cancelled("terminated; cleaned up".to_owned())),
        _ = hangup.recv() => Err(CommandError::Cancelled("the terminal is gone; cleaned up".to_owned())),
    };
    if let Err(CommandError::Failed { .. }) = &result {
        // The directory goes away; what the agents said must not go with it.
        eprint!("{}", rig.logs());
    }
    let left = rig.take_down().await;
    match (result, left) {
        (Ok(value), Ok(())) => Ok(value),
        (Ok(_), Err(error)) => Err(CommandError::failed(error)),
        (Err(error), left) => {
            if let Err(left) = left {
                eprintln!("vmove: {left}");
            }
            Err(error)
        }
    }
}
