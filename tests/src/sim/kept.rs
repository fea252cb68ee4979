//! Seeds that once broke a promise, as they are kept in `fixtures/seeds`: one a file, TOML.
//!
//! Never enters: running them.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::faults::Fault;

/// A seed that broke a promise.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// What it found.
    pub found: String,
    /// The seed.
    pub seed: u64,
    /// The faults it takes; those that the seed plans, if there are none here.
    pub faults: Option<Vec<Fault>>,
}

impl Kept {
    /// Reads one.
    ///
    /// # Errors
    /// A file that cannot be read or is no kept seed, by its name.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        toml::from_str(&text).with_context(|| path.display().to_string())
    }
}
