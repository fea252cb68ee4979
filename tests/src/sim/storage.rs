//! Disks of a simulated host: images whose unflushed sectors a power cut loses or tears, and the journal's medium.
//!
//! Lives here: what is cached, what is durable, what a crash leaves. Never enters: who writes, and why.

use std::{
    cell::{RefCell, RefMut},
    collections::BTreeMap,
    io::{self, Error},
    path::{Path, PathBuf},
    rc::Rc,
};

use vmove_storage::{BlockError, Medium, OwnerState, Place};

use super::dice::Dice;

/// Bytes of a simulated sector, the unit of writing and tearing: a quarter of a chunk.
pub const SECTOR_BYTES: u64 = 16 << 10;
/// A sector that is a hole.
pub const HOLE: u64 = 0;
/// A sector of allocated zeroes.
pub const ZERO: u64 = 1;
/// A sector torn by a power cut: neither what was there nor what was written.
pub const TORN: u64 = u64::MAX;
/// First value that stands for data.
pub const FIRST_STAMP: u64 = 2;

/// What a guest reads from a sector.
pub fn read_as(sector: u64) -> u64 {
    if sector == ZERO { HOLE } else { sector }
}

/// An image and the stamp beside it.
#[derive(Debug, Clone)]
pub struct Image {
    durable: Vec<u64>,
    /// Sectors written since the last flush, all their contents in order.
    cached: BTreeMap<usize, Vec<u64>>,
    /// Ownership: generation and state.
    pub stamp: Option<(u64, OwnerState)>,
}

impl Image {
    /// An empty image.
    pub fn new(sectors: usize, stamp: Option<(u64, OwnerState)>) -> Self {
        Self { durable: vec![HOLE; sectors], cached: BTreeMap::new(), stamp }
    }

    /// A sector as it reads now.
    pub fn read(&self, sector: usize) -> u64 {
        self.cached.get(&sector).and_then(|all| all.last()).copied().unwrap_or(self.durable[sector])
    }

    /// All sectors as they read now.
    pub fn contents(&self) -> Vec<u64> {
        (0..self.durable.len()).map(|sector| self.read(sector)).collect()
    }

    /// Writes a sector, into the cache.
    pub fn write(&mut self, sector: usize, value: u64) {
        self.cached.entry(sector).or_default().push(value);
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) {
        for (sector, values) in std::mem::take(&mut self.cached) {
            if let Some(last) = values.last() {
                self.durable[sector] = *last;
            }
        }
    }

    /// A power cut: of what was not flushed each sector keeps the old, has some of the new, or is torn.
    pub fn lose_power(&mut self, dice: &mut Dice) {
        for (sector, values) in std::mem::take(&mut self.cached) {
            match dice.index(values.len() + 2) {
                0 => {}
                1 => self.durable[sector] = TORN,
                at => self.durable[sector] = values[at - 2],
            }
        }
    }
}

/// What an append to a journal is to meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalFault {
    /// Nothing can be written (a full disk), once.
    Full,
    /// The bytes are written and the sync fails, once.
    SyncFails,
    /// From now on every sync fails.
    Broken,
    /// The process dies between the write and the sync.
    DiesUnsynced,
    /// The same, and the power fails a while later.
    DiesThenPowerCut,
    /// The power fails between the write and the sync.
    PowerCut,
}

#[derive(Debug, Default)]
struct Log {
    durable: Vec<u8>,
    cached: Vec<u8>,
    /// Where what the next sync writes begins. One that fails leaves it in the cache, marked clean, as Linux does: no later one writes it.
    dirty: Option<usize>,
    held: bool,
    fault: Option<JournalFault>,
    /// Set by a fault that ends the process or the host: the world carries it out.
    struck: Option<JournalFault>,
}

/// The journal's place on a host's disk; clones are the same place.
#[derive(Debug, Clone, Default)]
pub struct JournalPlace(Rc<RefCell<Log>>);

impl JournalPlace {
    /// Has the next append (or every one, by kind) meet a fault.
    pub fn plant(&self, fault: JournalFault) {
        self.0.borrow_mut().fault = Some(fault);
    }

    /// The disk is mended.
    pub fn mend(&self) {
        self.0.borrow_mut().fault = None;
    }

    /// A fault that struck and ends more than the append.
    pub fn struck(&self) -> Option<JournalFault> {
        self.0.borrow_mut().struck.take()
    }

    /// Syncs it beside its writer; whether that went well.
    pub fn sync_beside(&self) -> bool {
        self.0.borrow_mut().sync().is_ok()
    }

    /// Whether somebody holds it.
    pub fn is_held(&self) -> bool {
        self.0.borrow().held
    }

    /// A power cut: what was not synced is there in part, or not, or as rubbish.
    pub fn lose_power(&self, dice: &mut Dice) {
        let mut log = self.0.borrow_mut();
        let common = log.durable.iter().zip(&log.cached).take_while(|(a, b)| a == b).count();
        let mut left = log.cached.clone();
        if left.len() > log.durable.len() && common == log.durable.len() {
            let unsynced = left.len() - common;
            left.truncate(common + dice.index(unsynced + 1));
            if dice.one_in(3) {
                // The file's length got there, the bytes did not.
                left.resize(common + unsynced, 0);
            }
        } else {
            left.clone_from(&log.durable);
        }
        log.durable.clone_from(&left);
        (log.cached, log.dirty) = (left, None);
        log.held = false;
    }
}

/// A journal's medium, held by one.
#[derive(Debug)]
pub struct JournalMedium(Rc<RefCell<Log>>);

impl Drop for JournalMedium {
    fn drop(&mut self) {
        self.0.borrow_mut().held = false;
    }
}

impl JournalMedium {
    /// The log, unless a fault has ended whoever writes it: the world learns of that only after the call.
    fn log(&self) -> io::Result<RefMut<'_, Log>> {
        let log = self.0.borrow_mut();
        if log.struck.is_some() { Err(Error::other("never answered")) } else { Ok(log) }
    }
}

impl Medium for JournalMedium {
    fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.0.borrow().cached.clone())
    }

    fn cut(&self, len: u64) -> io::Result<()> {
        let mut log = self.log()?;
        log.cached.truncate(len as usize);
        log.touch(len as usize);
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut log = self.log()?;
        if log.fault == Some(JournalFault::Full) {
            log.fault = None;
            return Err(io::ErrorKind::StorageFull.into());
        }
        let end = at as usize + bytes.len();
        if log.cached.len() < end {
            log.cached.resize(end, 0);
        }
        log.cached[at as usize..end].copy_from_slice(bytes);
        log.touch(at as usize);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.log()?.sync()
    }
}

impl Log {
    fn touch(&mut self, at: usize) {
        self.dirty = Some(self.dirty.map_or(at, |from| from.min(at)));
    }

    fn sync(&mut self) -> io::Result<()> {
        let log = self;
        let dirty = log.dirty.is_some();
        match log.fault {
            Some(
                fault
                @ (JournalFault::DiesUnsynced | JournalFault::DiesThenPowerCut | JournalFault::PowerCut),
            ) if dirty => {
                log.struck = Some(fault);
                log.fault = None;
                Err(Error::other("never answered"))
            }
            Some(JournalFault::SyncFails) if dirty => {
                (log.fault, log.dirty) = (None, None);
                Err(Error::other("I/O error"))
            }
            Some(JournalFault::Broken) => {
                log.dirty = None;
                Err(Error::other("I/O error"))
            }
            _ => {
                if let Some(from) = log.dirty.take() {
                    log.durable.resize(from, 0);
                    log.durable.extend_from_slice(&log.cached[from..]);
                }
                Ok(())
            }
        }
    }
}

impl Place for JournalPlace {
    type Medium = JournalMedium;

    fn open(&self) -> vmove_storage::error::Result<JournalMedium> {
        let mut log = self.0.borrow_mut();
        if log.held {
            let conflict = "another process has the journal open";
            return Err(BlockError::Locked { path: PathBuf::from("journal"), conflict });
        }
        log.held = true;
        Ok(JournalMedium(Rc::clone(&self.0)))
    }

    fn read(&self) -> vmove_storage::error::Result<Vec<u8>> {
        Ok(self.0.borrow().cached.clone())
    }

    fn path(&self) -> &Path {
        Path::new("journal")
    }
}
