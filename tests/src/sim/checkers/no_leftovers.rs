//! No file is left over that nobody owns: images are the owner's, or stale and kept by wish; a VM's directory is only where it runs.

use vmove_mirror::journal::Standing;
use vmove_storage::OwnerState;

use super::super::world::World;

impl World {
    /// Looked at when everything has come to rest.
    pub fn check_no_leftovers(&mut self) {
        let mut faults = Vec::new();
        for host in &self.hosts {
            let standing = host.dir.as_ref().map(|dir| dir.look().standing().clone());
            let owned: Vec<String> = match &standing {
                Some(Standing::Owner { disks, .. }) => disks.iter().map(|at| at.path.clone()).collect(),
                Some(other) => {
                    faults.push(format!("host {} keeps the VM's directory: {other:?}", host.id));
                    Vec::new()
                }
                None => Vec::new(),
            };
            for (path, image) in &host.images {
                let kept = matches!(image.stamp, Some((_, OwnerState::Stale)));
                if !kept && !owned.contains(path) {
                    faults.push(format!("host {} keeps {path}, stamped {:?}", host.id, image.stamp));
                }
            }
            for path in owned {
                if !host.images.get(&path).is_some_and(|i| matches!(i.stamp, Some((_, OwnerState::Owned)))) {
                    faults.push(format!("host {} owns {path}, which is not stamped so", host.id));
                }
            }
        }
        if !faults.is_empty() {
            self.violate("no_leftovers", faults.join("; "));
        }
    }
}
