//! What outlives a VM's directory: how its moves ended, and by which of them it was taken over here.
//!
//! A host of a move that could not be heard for long asks for that, whenever it is back. Lives here: `<state>/moves`, one file a move.
//! Never enters: reports of VMs that are here (vmdir).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vmove_mirror::journal::{MoveId, Record, Standing};

use super::Agent;
use super::error::ApiError;
use super::vmdir::{VmDir, read_progress};
use crate::api::types::{MoveProgress, Verdict};
use crate::identity::files::write_private;

impl Agent {
    /// Moves the reports of a VM's moves to where they outlive its directory, and notes there by which moves it was taken over here: a
    /// source that comes back must learn of that for ever.
    pub(super) fn archive_moves(&self, vm: &VmDir) -> Result<(), ApiError> {
        let archive = self.archive_dir()?;
        for entry in std::fs::read_dir(vm.moves()).into_iter().flatten().filter_map(Result::ok) {
            let from = entry.path();
            // One that a power cut has emptied may be here already, from when the move was followed.
            if from.extension().is_some_and(|extension| extension == "json") && read_progress(&from).is_some()
            {
                let to = archive.join(entry.file_name());
                std::fs::rename(&from, &to).map_err(|e| ApiError::io("keep", &from, &e))?;
            }
        }
        let mut left = BTreeSet::new();
        for record in vm.records()? {
            match record {
                Record::TakenOver { move_id, generation, .. } => {
                    write_private(&self.taken_file(&move_id)?, &generation.to_string())?;
                }
                Record::Moving { move_id, .. } => drop(left.insert(move_id)),
                // Its process may have died between the record and the report.
                Record::Aborted { move_id } if left.contains(&move_id) => self.keep_given_up(&move_id)?,
                _ => {}
            }
        }
        // It has no process, so it can never commit; nobody could journal that.
        if let Standing::Moving { move_id, .. } = vm.journal()?.standing() {
            self.keep_given_up(move_id)?;
        }
        Ok(())
    }

    /// Notes that a move from here was given up, if nothing is known of its end.
    fn keep_given_up(&self, move_id: &MoveId) -> Result<(), ApiError> {
        if read_progress(&self.archive_dir()?.join(format!("{move_id}.json"))).is_none() {
            self.keep_progress(&given_up(move_id.as_str()))?;
        }
        Ok(())
    }

    /// The generation at which a VM that is not here any more was taken over here by this move.
    pub(super) fn taken_at(&self, vm: &VmDir, move_id: &MoveId) -> Result<Option<u64>, ApiError> {
        let by_journal = vm.records()?.into_iter().find_map(|record| match record {
            Record::TakenOver { move_id: taken, generation, .. } if taken == *move_id => Some(generation),
            _ => None,
        });
        if by_journal.is_some() {
            return Ok(by_journal);
        }
        let path = self.taken_file(move_id)?;
        match std::fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse() {
                Ok(generation) => Ok(Some(generation)),
                Err(_) => Err(ApiError::storage(format!("{} holds no generation", path.display()))),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ApiError::io("read", &path, &e)),
        }
    }

    fn taken_file(&self, move_id: &MoveId) -> Result<PathBuf, ApiError> {
        Ok(self.archive_dir()?.join(format!("{move_id}.taken")))
    }

    /// Where reports of moves are kept: `<state>/moves`.
    pub(super) fn archive_dir(&self) -> Result<PathBuf, ApiError> {
        let dir = self.state.join("moves");
        std::fs::create_dir_all(&dir).map_err(|e| ApiError::io("create", &dir, &e))?;
        Ok(dir)
    }

    /// Removes all but the newest `keep` of the kept reports.
    pub(super) fn prune_reports(&self, keep: usize) -> Result<(), ApiError> {
        let dir = self.archive_dir()?;
        let entries = std::fs::read_dir(&dir).map_err(|e| ApiError::io("list", &dir, &e))?;
        let mut reports: Vec<_> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let report = path.extension().is_some_and(|extension| extension == "json");
                report.then(|| Some((path.metadata().ok()?.modified().ok()?, path)))?
            })
            .collect();
        reports.sort_unstable_by(|a, b| b.cmp(a));
        for (_, path) in reports.into_iter().skip(keep) {
            std::fs::remove_file(&path).map_err(|e| ApiError::io("remove", &path, &e))?;
        }
        Ok(())
    }
}

/// The end of a move whose process left no report.
pub(super) fn given_up(move_id: &str) -> MoveProgress {
    MoveProgress {
        move_id: move_id.to_owned(),
        phase: "aborted".into(),
        error: Some("the VM's process ended before the commit".into()),
        ..MoveProgress::default()
    }
}

/// The word on a move that the journal knows nothing of: the VM's directory has gone since, its reports were kept.
pub(super) fn archived_verdict(archived: &Path) -> Verdict {
    match read_progress(archived) {
        Some(MoveProgress { report: Some(report), .. }) if report.outcome == "completed" => {
            if report.from.host == report.to.host { Verdict::Unknown } else { Verdict::Committed }
        }
        Some(progress) if ["aborted", "cancelled"].contains(&progress.phase.as_str()) => Verdict::Aborted,
        _ => Verdict::Unknown,
    }
}
