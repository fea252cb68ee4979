//! A VM's directory on this host: `<state>/vms/<vm>/{vm.toml,kernel,initrd,launch.json,journal,moves/,...}`.
//!
//! Lives here: reading and writing its files, the journal included. Never enters: processes, decisions.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmove_compute::process::protocol::{
    CONSOLE_SOCKET, DiskPlacement, JOURNAL_FILE, LAUNCH_FILE, LaunchSpec, MoveProgress, VmDefinition,
};
use vmove_mirror::journal::{DiskAt, Journal, Record};
use vmove_storage::{BlockError, JournalFile};

use super::error::ApiError;
use crate::identity::files::write_private;

/// Longest path of a unix socket (unix(7): `sun_path` has 108 bytes with the NUL).
pub const MAX_SOCKET_PATH: usize = 107;
/// Most bytes of a saved report or of an error text that are read.
const MAX_TEXT: u64 = 4 << 20;

/// The directory of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// The directory at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is such a VM.
    pub fn exists(&self) -> bool {
        self.path.join("vm.toml").exists()
    }

    /// Makes it; it is still there after a power cut when this returns.
    pub fn make(&self) -> Result<(), ApiError> {
        super::make_private_dir(&self.path).map_err(|e| ApiError::storage(e.to_string()))?;
        let parent = self.path.parent().unwrap_or(&self.path);
        sync_dir(parent)
    }

    /// Whether the sockets of a VM process fit here; else the reason why not, in words.
    pub fn sockets_fit(&self) -> Result<(), String> {
        let longest = self.path.join(CONSOLE_SOCKET).as_os_str().len();
        if longest <= MAX_SOCKET_PATH {
            return Ok(());
        }
        Err(format!(
            "the path of the VM's sockets in {} would have {longest} bytes, unix sockets allow {MAX_SOCKET_PATH}; \
             give the VM a name, or the agent a --state directory, that is {} bytes shorter",
            self.path.display(),
            longest - MAX_SOCKET_PATH
        ))
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.path.join("kernel")
    }

    /// The initial RAM disk; it may not be there.
    pub fn initrd(&self) -> PathBuf {
        self.path.join("initrd")
    }

    /// Standard output and error of the VM process.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Reports of moves.
    pub fn moves(&self) -> PathBuf {
        self.path.join("moves")
    }

    /// Why the process ended, in its own words.
    pub fn error_file(&self) -> PathBuf {
        self.path.join("error.txt")
    }

    /// The process's last error, if it left one.
    pub fn error_text(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.error_file()).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.chars().take(4096).collect())
    }

    /// The definition, as last saved.
    pub fn definition(&self) -> Result<VmDefinition, ApiError> {
        let path = self.path.join("vm.toml");
        let text = std::fs::read_to_string(&path).map_err(|e| ApiError::io("read", &path, &e))?;
        toml::from_str(&text).map_err(|e| ApiError::storage(format!("{}: {e}", path.display())))
    }

    /// Saves the definition.
    pub fn save_definition(&self, definition: &VmDefinition) -> Result<(), ApiError> {
        let text = toml::to_string(definition)
            .map_err(|e| ApiError::internal(format!("cannot write the definition as TOML: {e}")))?;
        Ok(write_private(&self.path.join("vm.toml"), &text)?)
    }

    /// What the last process was started with.
    pub fn launch(&self) -> Option<LaunchSpec> {
        serde_json::from_slice(&std::fs::read(self.path.join(LAUNCH_FILE)).ok()?).ok()
    }

    /// Saves what the next process is to be started with.
    pub fn save_launch(&self, spec: &LaunchSpec) -> Result<(), ApiError> {
        let text = serde_json::to_string_pretty(spec)
            .map_err(|e| ApiError::internal(format!("cannot write the launch file: {e}")))?;
        Ok(write_private(&self.path.join(LAUNCH_FILE), &text)?)
    }

    /// The journal as it is on disk; its writer may be alive.
    pub fn journal(&self) -> Result<Journal, ApiError> {
        Ok(Journal::replay(self.raw_records()?.iter().map(Vec::as_slice))?)
    }

    /// The journal as other hosts may act upon it: all of it is on disk when this returns, whoever wrote it, else a power cut could
    /// still take back what they were told.
    pub fn synced_journal(&self) -> Result<Journal, ApiError> {
        let path = self.path.join(JOURNAL_FILE);
        match self.durable_journal() {
            _ if !path.exists() => Ok(Journal::default()),
            // Its writer lives. What that could not sync it is just writing again, or it ends: a moment in which this may be wrong.
            Err(AppendError::InUse) => {
                let journal = self.journal()?;
                std::fs::File::open(&path)
                    .and_then(|file| file.sync_all())
                    .map_err(|e| ApiError::io("sync", &path, &e))?;
                Ok(journal)
            }
            journal => Ok(journal?),
        }
    }

    /// The journal of a VM without a process, to be acted upon: what a process wrote and died before it synced, or could not sync, is
    /// made durable first, else a power cut could still take back what was decided from it.
    pub fn durable_journal(&self) -> Result<Journal, AppendError> {
        let _held = self.hold()?;
        self.journal().map_err(AppendError::Failed)
    }

    /// All records, oldest first.
    pub fn records(&self) -> Result<Vec<Record>, ApiError> {
        self.raw_records()?.iter().map(|bytes| Ok(Record::decode(bytes)?)).collect()
    }

    fn raw_records(&self) -> Result<Vec<Vec<u8>>, ApiError> {
        Ok(JournalFile::read_all(&self.path.join(JOURNAL_FILE))?)
    }

    /// Appends a record, if it is admitted; durable when this returns. Only while no VM process has the journal.
    pub fn append(&self, record: &Record) -> Result<(), AppendError> {
        let mut held = self.hold()?;
        // Read again under the lock: what stood before it may not stand any more.
        let failed = |e: ApiError| AppendError::Failed(e);
        self.journal().map_err(failed)?.admit(record).map_err(|e| failed(e.into()))?;
        let bytes = record.encode().map_err(|e| failed(e.into()))?;
        held.file.append(&bytes).map_err(|e| failed(e.into()))
    }

    /// Opens the journal for this agent alone; what it holds then is on disk.
    fn hold(&self) -> Result<Held, AppendError> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let file = JournalFile::open(&self.path.join(JOURNAL_FILE)).map_err(|e| match e {
            BlockError::Locked { .. } => AppendError::InUse,
            other => AppendError::Failed(other.into()),
        })?;
        Ok(Held { file, _turn: turn })
    }

    /// The saved progress of a move, if it is there and readable.
    pub fn saved_move(&self, move_id: &str) -> Option<MoveProgress> {
        read_progress(&self.moves().join(format!("{move_id}.json")))
    }

    /// A new file of the directory for a copied kernel or RAM disk, only for its owner's eyes.
    pub fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), ApiError> {
        let mut file = std::fs::File::create(path).map_err(|e| ApiError::io("create", path, &e))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| ApiError::io("write", path, &e))
    }
}

/// Whose turn it is: one task of the agent has a journal open at a time, so that one that is in use has a process, or one that is ending.
static TURN: Mutex<()> = Mutex::new(());

/// A journal that is open for the agent alone.
struct Held {
    file: JournalFile,
    _turn: MutexGuard<'static, ()>,
}

/// Makes what was created in, or removed from, a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<(), ApiError> {
    let sync = || std::fs::File::open(path)?.sync_all();
    sync().map_err(|e| ApiError::io("sync", path, &e))
}

/// Why a record was not appended.
#[derive(Debug)]
pub enum AppendError {
    /// A VM process has the journal: ask it instead.
    InUse,
    /// It was refused, or could not be written.
    Failed(ApiError),
}

impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::InUse => Self::busy("the VM's process has its journal open"),
            AppendError::Failed(error) => error,
        }
    }
}

/// Reads a saved progress file; none if it is not there or not readable.
pub fn read_progress(path: &Path) -> Option<MoveProgress> {
    if std::fs::metadata(path).ok()?.len() > MAX_TEXT {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Placements as the journal has them, for the protocol.
pub fn placements(disks: &[DiskAt]) -> Vec<DiskPlacement> {
    disks
        .iter()
        .map(|disk| DiskPlacement {
            name: disk.name.clone(),
            datastore: disk.datastore.clone(),
            path: PathBuf::from(&disk.path),
        })
        .collect()
}

/// Placements for the journal.
pub fn disks_at(placements: &[DiskPlacement]) -> Result<Vec<DiskAt>, ApiError> {
    placements
        .iter()
        .map(|disk| {
            let path = disk
                .path
                .to_str()
                .ok_or_else(|| ApiError::invalid(format!("the path {} is not UTF-8", disk.path.display())))?;
            Ok(DiskAt { name: disk.name.clone(), datastore: disk.datastore.clone(), path: path.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmove_mirror::journal::{MoveId, Standing};

    #[test]
    fn a_path_too_long_for_a_socket_is_known_beforehand() {
        let room = MAX_SOCKET_PATH - "/console.sock".len();
        let fits = VmDir::new(PathBuf::from("x".repeat(room)));
        assert_eq!(fits.sockets_fit(), Ok(()));
        let long = VmDir::new(PathBuf::from("x".repeat(room + 3)));
        assert!(long.sockets_fit().unwrap_err().contains("3 bytes shorter"));
    }

    #[test]
    fn the_journal_admits_and_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmDir::new(dir.path().to_path_buf());
        assert_eq!(*vm.journal().unwrap().standing(), Standing::Nothing);
        vm.append(&Record::Owner { generation: 1, disks: vec![] }).unwrap();
        let id = MoveId::new("m").unwrap();
        assert!(matches!(vm.append(&Record::Committed { move_id: id.clone() }), Err(AppendError::Failed(_))));
        let held = JournalFile::open(&dir.path().join(JOURNAL_FILE)).unwrap();
        let moving = Record::Moving { move_id: id, to_host: None, generation: 2 };
        assert!(matches!(vm.append(&moving), Err(AppendError::InUse)));
        drop(held);
        vm.append(&moving).unwrap();
        assert_eq!(vm.records().unwrap().len(), 2);
    }
}
