//! Disks that fail on demand (`vmove_storage`'s `faults`).

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing, zeroing, growing.
    Write,
    /// Bringing what was written to the disk.
    Sync,
}

/// The faults of a cluster's VM processes and agents.
#[derive(Debug)]
pub struct Faults {
    dir: PathBuf,
}

impl Faults {
    /// None yet; kept as files in `dir`, which is made.
    pub fn new(dir: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        Self { dir: dir.to_owned() }
    }

    /// What an agent's environment must hold; its VM processes inherit it.
    pub fn environment(&self) -> (&'static str, String) {
        ("VMOVE_FAULTS", self.dir.display().to_string())
    }

    /// From now on `operation` fails with this error number where it meets these bytes of an image's file.
    pub fn fail(&self, image: &Path, operation: Operation, errno: i32, bytes: Range<u64>) {
        let kind = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Sync => "sync",
        };
        let name = format!("{}.{kind}", image.display().to_string().replace('/', "%"));
        // It appears whole.
        let partial = self.dir.join("partial");
        fs::write(&partial, format!("{errno} {} {}", bytes.start, bytes.end)).unwrap();
        fs::rename(partial, self.dir.join(name)).unwrap();
    }

    /// All disks are well again.
    pub fn mend(&self) {
        for entry in fs::read_dir(&self.dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}
