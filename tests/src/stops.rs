//! Stop points of VM processes (`vmove_compute::migrate::stop_points`): holding a move between two of its steps.

use std::fs;
use std::path::{Path, PathBuf};

use crate::wait::until;

/// Points at which the VM processes of a cluster are held.
#[derive(Debug)]
pub struct Stops {
    dir: PathBuf,
}

impl Stops {
    /// Holds at `points` from the beginning, by way of files in `dir`, which is made.
    pub fn new(dir: &Path, points: &[&str]) -> Self {
        fs::create_dir(dir).unwrap();
        let stops = Self { dir: dir.to_owned() };
        for point in points {
            stops.hold(point);
        }
        stops
    }

    /// What an agent's environment must hold; its VM processes inherit it.
    pub fn environment(&self) -> [(&'static str, String); 1] {
        [("VMOVE_STOP_DIR", self.dir.display().to_string())]
    }

    /// Holds whoever comes to a point from now on.
    pub fn hold(&self, point: &str) {
        // Whoever was there before is not whom a test waits for now.
        let _ = fs::remove_file(self.file(point, "reached"));
        fs::write(self.file(point, "hold"), "").unwrap();
    }

    /// Waits until a process is held at a point; gives its id.
    pub fn reached(&self, point: &str) -> u32 {
        until(&format!("a process at {point}"), || self.is_reached(point))
    }

    /// The process that is held at a point, if one is.
    pub fn is_reached(&self, point: &str) -> Option<u32> {
        fs::read_to_string(self.file(point, "reached")).ok()?.parse().ok()
    }

    /// Lets whoever is or will be at a point go on.
    pub fn release(&self, point: &str) {
        // Released twice is released.
        let _ = fs::remove_file(self.file(point, "hold"));
    }

    /// Lets whoever is or will be at any point go on.
    pub fn release_all(&self) {
        for entry in fs::read_dir(&self.dir).unwrap().filter_map(Result::ok) {
            if entry.path().extension().is_some_and(|extension| extension == "hold") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn file(&self, point: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{point}.{kind}"))
    }
}
