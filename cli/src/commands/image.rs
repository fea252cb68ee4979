//! `vmove image info|check`: what an image says about itself, and whether it is sound. Needs no agent.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use vmove_storage::check::CheckReport;

use super::CommandError;
use crate::render::{self, units};

/// What to do with an image.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum ImageCommand {
    /// Format, sizes and relations of an image
    Info(ImageArgs),
    /// Compare the tables of a qcow2 image with its refcounts; exit code 1 if it has errors
    Check(CheckArgs),
}

/// Arguments of the image commands.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ImageArgs {
    /// The image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `vmove image check`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct CheckArgs {
    /// The image and the output.
    #[command(flatten)]
    pub image: ImageArgs,
    /// Rebuild the refcounts if they are wrong, and remove the marks of an unclean end
    #[arg(long)]
    pub repair: bool,
}

impl ImageCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<(), CommandError> {
        match self {
            Self::Info(args) => info(&args.file, args.json),
            Self::Check(args) => args.run(),
        }
    }
}

fn info(path: &Path, json: bool) -> Result<(), CommandError> {
    let info = vmove_storage::image::info(path).map_err(CommandError::failed)?;
    if json {
        render::print_json(&info)?;
        return Ok(());
    }
    let mut text = format!("{}: {}\n", path.display(), info.format.name());
    // Writing to a String cannot fail, here and below.
    let _ =
        writeln!(text, "  virtual size  {} ({} bytes)", units::size(info.virtual_bytes), info.virtual_bytes);
    let _ = writeln!(
        text,
        "  allocated     {} of a file of {}",
        units::size(info.allocated_bytes),
        units::size(info.file_bytes)
    );
    if let Some(cluster) = info.cluster_bytes {
        let _ = writeln!(text, "  cluster size  {}", units::size(cluster));
    }
    if let Some(backing) = &info.backing {
        let format = info.backing_format.as_deref().unwrap_or("format not named");
        let _ = writeln!(text, "  backing file  {backing} ({format})");
    }
    if info.internal_snapshots > 0 {
        let _ = writeln!(text, "  snapshots     {}", info.internal_snapshots);
    }
    if info.dirty {
        text.push_str("  not closed cleanly\n");
    }
    if info.corrupt {
        text.push_str("  marked as corrupt\n");
    }
    render::print(&text)?;
    Ok(())
}

impl CheckArgs {
    fn run(&self) -> Result<(), CommandError> {
        let path = &self.image.file;
        let work = if self.repair { vmove_storage::repair::repair } else { vmove_storage::check::check };
        let report = work(path).map_err(CommandError::failed)?;
        if self.image.json {
            render::print_json(&report)?;
        } else {
            render::print(&findings(path, &report))?;
        }
        if report.repaired || !(report.has_errors() || report.dirty || report.corrupt) {
            return Ok(());
        }
        let advice = if report.invalid_entries > 0 {
            "its tables are damaged and cannot be repaired: restore the image from a copy"
        } else {
            "'vmove image check --repair' can put this right"
        };
        Err(CommandError::failed(format!("{} is not sound; {advice}", path.display())))
    }
}

fn findings(path: &Path, report: &CheckReport) -> String {
    let mut text = format!("{}: ", path.display());
    let found = [
        (report.invalid_entries, "invalid table entries"),
        (report.refcounts_too_low, "refcounts that are too low"),
        (report.wrong_copied_marks, "wrong copied marks"),
        (report.leaked_clusters, "leaked clusters"),
        (u64::from(report.dirty), "mark of an unclean end"),
        (u64::from(report.corrupt), "mark of corruption"),
    ];
    let found: Vec<String> =
        found.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    text.push_str(&if found.is_empty() { "no problems".to_owned() } else { found.join(", ") });
    text.push_str(if report.repaired { ": repaired\n" } else { "\n" });
    for message in &report.messages {
        let _ = writeln!(text, "  {message}");
    }
    let _ = writeln!(
        text,
        "  {} of {} clusters of {} in use, {} compressed",
        report.data_clusters,
        report.virtual_clusters,
        units::size(report.cluster_bytes),
        report.compressed_clusters
    );
    text
}
