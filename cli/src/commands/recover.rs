//! `vmove recover`: who holds what of a VM; settles it, or says what is waited for and what a person could decide.

use std::fmt::Write as _;

use super::CommandError;
use super::confirm::confirm;
use crate::api::recovery::{HostStanding, RecoveryReport, StandingKind, TakeOver};
use crate::client::Client;
use crate::render::{self, units};

/// Arguments of `vmove recover`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct RecoverArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Make the host that waits for a host that is gone for ever the owner (says what that risks, and asks)
    #[arg(long, conflicts_with = "discard")]
    pub take_ownership: bool,
    /// Remove the images that HOST kept of a VM that another host took over (asks)
    #[arg(long, value_name = "HOST")]
    pub discard: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RecoverArgs {
    /// Settles and shows; then does what was explicitly asked for. Code 3 if it is not decided who owns the VM.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let mut report = client.recover(&self.vm).await?;
        if self.take_ownership {
            self.take_over(client, &report).await?;
            report = client.recover(&self.vm).await?;
        }
        if let Some(host) = &self.discard {
            self.discard_lost(client, &report, host).await?;
            report = client.recover(&self.vm).await?;
        }
        if self.json {
            render::print_json(&report)?;
        } else {
            render::print(&text(&report))?;
        }
        if report.settled { Ok(()) } else { Err(CommandError::Undecided(report.summary)) }
    }

    async fn take_over(&self, client: &Client, report: &RecoveryReport) -> Result<(), CommandError> {
        let Some(offer) = &report.take_over else {
            eprint!("{}", text(report));
            let missing = report.hosts.iter().find(|held| {
                held.waits_for.is_some() && held.images.iter().any(|image| image.allocated_bytes.is_none())
            });
            return Err(if report.settled {
                CommandError::failed(format!("{} is not to be taken over: {}", self.vm, report.summary))
            } else if let Some(held) = missing {
                CommandError::Undecided(format!(
                    "{} is not to be taken over on host {}: an image of it is missing there",
                    self.vm, held.host
                ))
            } else {
                CommandError::Undecided(format!(
                    "nothing of {} can be taken over: that needs one host that waits for one that is gone, and all others to answer and to hold \
                     nothing of it; take those that are gone for ever out of the cluster (`vmove host rm`)",
                    self.vm
                ))
            });
        };
        eprint!("{}", risks(offer));
        confirm(&self.vm, &format!("host {} is made the owner of {}", offer.host, self.vm), self.yes)?;
        client.take_over(&self.vm, &offer.host).await?;
        Ok(())
    }

    async fn discard_lost(
        &self,
        client: &Client,
        report: &RecoveryReport,
        host: &str,
    ) -> Result<(), CommandError> {
        let lost = report.hosts.iter().find(|held| held.host == host && held.standing == StandingKind::Lost);
        let Some(lost) = lost else {
            return Err(CommandError::failed(format!("host {host} keeps no {} that it has lost", self.vm)));
        };
        for image in &lost.images {
            eprintln!(
                "{} will be removed: what its guest wrote on host {host} is nowhere else",
                image.path.display()
            );
        }
        confirm(&self.vm, &format!("what host {host} kept of {} is removed", self.vm), self.yes)?;
        client.discard_lost(&self.vm, host).await?;
        Ok(())
    }
}

fn word(standing: StandingKind) -> &'static str {
    match standing {
        StandingKind::Nothing => "nothing of it",
        StandingKind::Owner => "owner",
        StandingKind::Moving => "owner, on the move",
        StandingKind::Arriving => "arriving",
        StandingKind::Prepared => "arrived, prepared",
        StandingKind::Left => "has left",
        StandingKind::Discarded => "arrival given up",
        StandingKind::Released => "has left, released",
        StandingKind::Lost => "taken over by another host",
    }
}

fn text(report: &RecoveryReport) -> String {
    let mut text = format!("{}\n", report.summary);
    // Writing to a String cannot fail, here and below.
    for host in &report.hosts {
        held(&mut text, host);
    }
    for silent in &report.unreachable {
        let _ = writeln!(text, "\nhost {}: does not answer\n  {}", silent.host, silent.error);
    }
    let waits_for: Vec<&str> = report.hosts.iter().filter_map(|host| host.waits_for.as_deref()).collect();
    if let ([awaited], None) = (&waits_for[..], &report.take_over) {
        for third in report.unreachable.iter().filter(|silent| silent.host != *awaited) {
            let _ = writeln!(
                text,
                "\nHost {} may have {} as well. If it is gone for ever, `vmove host rm {}` takes it out of the cluster.",
                third.host, report.vm, third.host
            );
        }
    }
    if let Some(offer) = &report.take_over {
        let _ = write!(
            text,
            "\nIf host {} is gone for ever, `vmove recover {} --take-ownership`:\n{}",
            offer.instead_of,
            report.vm,
            risks(offer)
        );
    }
    text
}

fn held(text: &mut String, host: &HostStanding) {
    let _ = write!(text, "\nhost {}: {}", host.host, word(host.standing));
    if let Some(generation) = host.generation {
        let _ = write!(text, ", generation {generation}");
    }
    if let Some(process) = &host.process {
        let _ = write!(text, ", process {} ({})", process.pid, process.state);
    }
    text.push('\n');
    if let Some(id) = &host.move_id {
        let other =
            host.other_host.as_deref().map_or_else(String::new, |other| format!(", other host {other}"));
        let _ = writeln!(text, "  move    {id}{other}");
    }
    for image in &host.images {
        let size = image.allocated_bytes.map_or_else(|| "missing".to_owned(), units::size);
        let _ = writeln!(
            text,
            "  disk    {} in {}: {} ({size}, {})",
            image.disk,
            image.datastore,
            image.path.display(),
            image.stamp
        );
    }
    let _ = writeln!(text, "  next    {}", host.next);
}

fn risks(offer: &TakeOver) -> String {
    let mut text = format!("  {} (instead of host {})\n  What it risks:\n", offer.effect, offer.instead_of);
    for risk in &offer.risks {
        let _ = writeln!(text, "  - {risk}");
    }
    text
}
