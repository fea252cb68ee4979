//! Stop points of VM processes (`vmove_compute::migrate::stop_points`): holding a move between two of its steps.

use std::fs;
use std::path::{Path, PathBuf};

use crate::wait::until;

/// Points at which the VM processes of a cluster are held, named when its agents are started.
#[derive(Debug)]
pub struct Stops {
    dir: PathBuf,
    names: Vec<String>,
}

impl Stops {
    /// Points held by way of files in `dir`, which is made.
    pub fn new(dir: &Path, names: &[&str]) -> Self {
        fs::create_dir(dir).unwrap();
        Self { dir: dir.to_owned(), names: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    /// What an agent's environment must hold; its VM processes inherit it.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [("VMOVE_STOP_AT", self.names.join(",")), ("VMOVE_STOP_DIR", self.dir.display().to_string())]
    }

    /// Waits until a process is held at a point; gives its id.
    pub fn reached(&self, name: &str) -> u32 {
        assert!(
            self.names.iter().any(|known| known == name),
            "{name} is not among the points named at the start"
        );
        until(&format!("a process at {name}"), || {
            fs::read_to_string(self.dir.join(format!("{name}.reached"))).ok()?.parse().ok()
        })
    }

    /// Lets whoever is or will be at a point go on.
    pub fn release(&self, name: &str) {
        fs::write(self.dir.join(format!("{name}.go")), "").unwrap();
    }

    /// Holds the next process that comes to a point that was released.
    pub fn hold_again(&self, name: &str) {
        for file in ["reached", "go"] {
            // A point that was never reached or released has no such file.
            let _ = fs::remove_file(self.dir.join(format!("{name}.{file}")));
        }
    }
}
