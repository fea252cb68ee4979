//! `vmove image info`: what an image says about itself. Needs no agent.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::CommandError;
use crate::render::{self, units};

/// What to do with an image.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum ImageCommand {
    /// Format, sizes and relations of an image
    Info(ImageArgs),
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

impl ImageCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<(), CommandError> {
        match self {
            Self::Info(args) => info(&args.file, args.json),
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
