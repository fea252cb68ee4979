//! `vmove generate` (hidden): man pages and shell completions, made from the command line's own description.
//!
//! The Debian package takes them from there (`packaging/build-deb`).

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, CommandError};

/// Arguments of `vmove generate`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct GenerateArgs {
    /// Directory that gets `man/*.1` and `completions/{vmove.bash,_vmove,vmove.fish}`
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

impl GenerateArgs {
    /// Writes all of them.
    pub fn run(&self) -> Result<(), CommandError> {
        let (man, completions) = (self.dir.join("man"), self.dir.join("completions"));
        for dir in [&man, &completions] {
            let failed = |e| CommandError::failed(format!("cannot create {}: {e}", dir.display()));
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let failed = |e| CommandError::failed(format!("cannot write to {}: {e}", self.dir.display()));
        clap_mangen::generate_to(Cli::command(), &man).map_err(failed)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut Cli::command(), "vmove", &completions).map_err(failed)?;
        }
        Ok(())
    }
}
