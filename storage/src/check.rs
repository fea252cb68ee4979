//! Walks the tables of a qcow2 file and compares what they refer to with its refcounts. Changes nothing.
//!
//! Needs no ring: it runs on images that nobody has open for writing. Layout of tables and entries: QEMU's
//! `docs/interop/qcow2.txt`. What is found wrong can be put right by [`crate::repair`], as far as it concerns
//! refcounts only.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use crate::error::{BlockError, Result};
use crate::header::Header;
use crate::lock::{ImageLock, LockMode};

/// Offset part of L1 and L2 entries.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Mark of entries whose cluster has exactly one reference.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Cluster reads as zeroes (version 3).
const ALL_ZEROES: u64 = 1;
const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ALL_ZEROES);
/// Files with more clusters than this are not checked: 16 bytes of memory each.
const MAX_CLUSTERS: u64 = 1 << 27;
/// How many clusters past the end of the file an entry may lie: allocated, never written.
const PAST_END: u64 = 1 << 16;
/// Problems described in words; all are counted.
const MAX_MESSAGES: usize = 32;
/// Longest snapshot table, in bytes.
const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;

/// Result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CheckReport {
    /// Entries that point nowhere sensible or have reserved bits set. These cannot be repaired.
    pub invalid_entries: u64,
    /// Clusters in use more often than their refcount says: a later write could give them away. Repairable.
    pub refcounts_too_low: u64,
    /// Clusters in use less often than their refcount says: space lost, nothing worse. Repairable.
    pub leaked_clusters: u64,
    /// Entries whose "exactly one reference" mark is wrong. Repairable.
    pub wrong_copied_marks: u64,
    /// Clusters with guest data in the active disk, compressed ones included.
    pub data_clusters: u64,
    /// Compressed clusters among them.
    pub compressed_clusters: u64,
    /// Clusters the active disk could have.
    pub virtual_clusters: u64,
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// Whether the image was marked as not closed cleanly.
    pub dirty: bool,
    /// Whether the image was marked corrupt.
    pub corrupt: bool,
    /// Whether the refcounts were rebuilt and the marks above removed, see [`crate::repair`].
    pub repaired: bool,
    /// The first problems in words.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Whether data is, or may come to be, wrong. Leaks and marks of an unclean close are not errors.
    pub fn has_errors(&self) -> bool {
        self.invalid_entries + self.refcounts_too_low + self.wrong_copied_marks > 0
    }

    /// Whether there is nothing to repair at all.
    pub fn is_clean(&self) -> bool {
        !self.has_errors() && self.leaked_clusters == 0 && !self.dirty && !self.corrupt
    }

    fn note(&mut self, message: impl FnOnce() -> String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message());
        }
    }
}

/// Checks the qcow2 image at `path`. Backing files are not checked.
///
/// # Errors
/// When the image is open for writing elsewhere, its header is unusable, or it cannot be read. Problems with the
/// tables are in the report.
pub fn check(path: &Path) -> Result<CheckReport> {
    let _lock = ImageLock::take(path, LockMode::Read)?;
    let file = File::open(path).map_err(|e| BlockError::io("open", path, e))?;
    Ok(Scan::run(&file, path)?.report)
}

/// An L1 or L2 entry of the active disk: where it is stored and what it says.
pub(crate) struct Marked {
    pub(crate) at: u64,
    pub(crate) entry: u64,
}

/// How an L2 table is used. A table that snapshots share is walked once, but each of its entries counts for each.
#[derive(Clone, Copy, Default)]
struct Usage {
    times: u32,
    active: bool,
}

/// Everything a walk found out.
pub(crate) struct Scan {
    pub(crate) header: Header,
    /// References by cluster of the file, those by refcount table and blocks left out.
    pub(crate) references: Vec<u32>,
    /// Active entries whose "exactly one reference" mark is wrong.
    pub(crate) wrong_marks: Vec<Marked>,
    pub(crate) report: CheckReport,
}

impl Scan {
    /// Walks the image. The caller holds a lock.
    pub(crate) fn run(file: &File, path: &Path) -> Result<Self> {
        let header = Header::read_from(file, path)?;
        let walk = Walk::new(file, path, header)?;
        walk.finish()
    }
}

struct Walk<'a> {
    file: &'a File,
    path: &'a Path,
    header: Header,
    references: Vec<u32>,
    /// Clusters an entry may refer to.
    limit: u64,
    /// L2 tables by offset.
    tables: BTreeMap<u64, Usage>,
    report: CheckReport,
}

impl<'a> Walk<'a> {
    fn new(file: &'a File, path: &'a Path, header: Header) -> Result<Self> {
        let file_bytes = file.metadata().map_err(|e| BlockError::io("look at", path, e))?.len();
        let clusters = file_bytes.div_ceil(header.cluster_bytes());
        if clusters > MAX_CLUSTERS {
            let reason = format!("it has {clusters} clusters, more than can be checked in memory");
            return Err(BlockError::Damaged { path: path.to_path_buf(), reason });
        }
        let report = CheckReport {
            cluster_bytes: header.cluster_bytes(),
            virtual_clusters: header.virtual_bytes.div_ceil(header.cluster_bytes()),
            dirty: header.dirty,
            corrupt: header.corrupt,
            ..CheckReport::default()
        };
        let references = vec![0; clusters as usize];
        Ok(Self {
            file,
            path,
            header,
            references,
            limit: clusters + PAST_END,
            tables: BTreeMap::new(),
            report,
        })
    }

    fn finish(mut self) -> Result<Scan> {
        self.refer(0, 1, "the header");
        self.l1_table(self.header.l1_offset, self.header.l1_entries, true)?;
        self.snapshots()?;
        for (offset, usage) in std::mem::take(&mut self.tables) {
            self.l2_table(offset, usage)?;
        }
        let wrong_marks = self.wrong_marks()?;
        let mut references = self.references.clone();
        let refcounts = self.refcounts(&mut references)?;
        self.compare(&references, &refcounts);
        Ok(Scan { header: self.header, references: self.references, wrong_marks, report: self.report })
    }

    fn invalid(&mut self, message: impl FnOnce() -> String) {
        self.report.invalid_entries += 1;
        self.report.note(message);
    }

    /// Counts `times` uses of `cluster`; `false` (and an invalid entry) if there can be no such cluster.
    fn refer(&mut self, cluster: u64, times: u32, user: &str) -> bool {
        if cluster >= self.limit {
            self.invalid(|| format!("{user} lies past the end of the file (cluster {cluster})"));
            return false;
        }
        let index = cluster as usize;
        if index >= self.references.len() {
            self.references.resize(index + 1, 0);
        }
        self.references[index] = self.references[index].saturating_add(times);
        true
    }

    fn read_entries(&self, offset: u64, count: usize) -> Result<Vec<u64>> {
        read_entries(self.file, self.path, offset, count)
    }

    fn l1_table(&mut self, offset: u64, entries: u32, active: bool) -> Result<()> {
        let cluster = self.header.cluster_bytes();
        if entries == 0 {
            return Ok(());
        }
        let bytes = u64::from(entries) * 8;
        if !offset.is_multiple_of(cluster) || offset / cluster >= self.limit || bytes > 32 << 20 {
            self.invalid(|| format!("an L1 table has the invalid place {offset:#x} or size {entries}"));
            return Ok(());
        }
        for index in 0..bytes.div_ceil(cluster) {
            self.refer(offset / cluster + index, 1, "an L1 table");
        }
        for (index, entry) in self.read_entries(offset, entries as usize)?.into_iter().enumerate() {
            let table = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 || !table.is_multiple_of(cluster) {
                self.invalid(|| format!("L1 entry {index} is invalid: {entry:#x}"));
            } else if table != 0 && self.refer(table / cluster, 1, "an L2 table") {
                let usage = self.tables.entry(table).or_default();
                usage.times = usage.times.saturating_add(1);
                usage.active |= active;
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, offset: u64, usage: Usage) -> Result<()> {
        let cluster = self.header.cluster_bytes();
        for (index, entry) in self.read_entries(offset, (cluster / 8) as usize)?.into_iter().enumerate() {
            let at = offset + index as u64 * 8;
            if entry & COMPRESSED != 0 {
                self.compressed(at, entry, usage);
                continue;
            }
            let data = entry & OFFSET_MASK;
            let zero_in_v2 = self.header.version < 3 && entry & ALL_ZEROES != 0;
            if entry & L2_RESERVED != 0 || zero_in_v2 || !data.is_multiple_of(cluster) {
                self.invalid(|| format!("the L2 entry at {at:#x} is invalid: {entry:#x}"));
            } else if data != 0 && self.refer(data / cluster, usage.times, "a data cluster") && usage.active {
                self.report.data_clusters += u64::from(entry & ALL_ZEROES == 0);
            }
        }
        Ok(())
    }

    /// A compressed cluster uses whole 512-byte sectors, which may begin and end in the middle of clusters.
    fn compressed(&mut self, at: u64, entry: u64, usage: Usage) {
        let size_shift = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << size_shift) - 1) & 0x00ff_ffff_ffff_ffff;
        let sectors = ((entry & (COMPRESSED - 1)) >> size_shift) + 1;
        let end = (offset & !511) + sectors * 512;
        let cluster = self.header.cluster_bytes();
        if entry & COPIED != 0 || offset < cluster {
            self.invalid(|| format!("the compressed L2 entry at {at:#x} is invalid: {entry:#x}"));
            return;
        }
        let mut valid = true;
        for index in offset / cluster..=(end - 1) / cluster {
            valid &= self.refer(index, usage.times, "a compressed cluster");
        }
        if valid && usage.active {
            self.report.data_clusters += 1;
            self.report.compressed_clusters += 1;
        }
    }

    fn snapshots(&mut self) -> Result<()> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for _ in 0..self.header.snapshots {
            let mut fixed = [0; 40];
            self.read(at, &mut fixed)?;
            let number = |range: std::ops::Range<usize>| {
                fixed[range].iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte))
            };
            self.l1_table(number(0..8), number(8..12) as u32, false)?;
            let names = number(12..14) + number(14..16) + number(36..40);
            at += (40 + names).next_multiple_of(8);
            if at - start > MAX_SNAPSHOT_TABLE {
                self.invalid(|| "the snapshot table is too long".to_owned());
                return Ok(());
            }
        }
        let cluster = self.header.cluster_bytes();
        for index in 0..(at - start).div_ceil(cluster) {
            self.refer(start / cluster + index, 1, "the snapshot table");
        }
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(|e| BlockError::io("read the tables of", self.path, e))
    }

    /// Active entries whose mark disagrees with the number of references found. Entries that are invalid have no
    /// cluster to disagree about.
    fn wrong_marks(&mut self) -> Result<Vec<Marked>> {
        let mut wrong = Vec::new();
        let cluster = self.header.cluster_bytes();
        let is_wrong = |walk: &Self, entry: u64| {
            let users = walk.references.get(((entry & OFFSET_MASK) / cluster) as usize).copied();
            let has_cluster = entry & OFFSET_MASK != 0 && entry & COMPRESSED == 0;
            has_cluster && users.is_some_and(|users| (users == 1) != (entry & COPIED != 0))
        };
        let l1 = self.header.l1_offset;
        for (index, entry) in self.read_entries(l1, self.header.l1_entries as usize)?.into_iter().enumerate()
        {
            if is_wrong(self, entry) {
                wrong.push(Marked { at: l1 + index as u64 * 8, entry });
            }
            let table = entry & OFFSET_MASK;
            if table == 0 || table / cluster >= self.limit {
                continue;
            }
            for (index, entry) in self.read_entries(table, (cluster / 8) as usize)?.into_iter().enumerate() {
                if is_wrong(self, entry) {
                    wrong.push(Marked { at: table + index as u64 * 8, entry });
                }
            }
        }
        // A table that two active L1 entries share was looked at twice; its marks are to be flipped once.
        wrong.sort_unstable_by_key(|mark| mark.at);
        wrong.dedup_by_key(|mark| mark.at);
        self.report.wrong_copied_marks = wrong.len() as u64;
        for mark in wrong.iter().take(MAX_MESSAGES) {
            self.report
                .note(|| format!("the entry at {:#x} has a wrong COPIED mark: {:#x}", mark.at, mark.entry));
        }
        Ok(wrong)
    }

    /// Reads the stored refcounts, and counts the clusters of the refcount structures themselves.
    fn refcounts(&mut self, references: &mut Vec<u32>) -> Result<Vec<u64>> {
        let cluster = self.header.cluster_bytes();
        let table = self.header.refcount_table_offset;
        let table_clusters = u64::from(self.header.refcount_table_clusters);
        let per_block = (cluster * 8) >> self.header.refcount_order;
        let entries = self.read_entries(table, (table_clusters * cluster / 8) as usize)?;
        std::mem::swap(&mut self.references, references);
        for index in 0..table_clusters {
            self.refer(table / cluster + index, 1, "the refcount table");
        }
        let mut refcounts = Vec::new();
        for (index, entry) in entries.into_iter().enumerate() {
            if entry & !OFFSET_MASK != 0 || !entry.is_multiple_of(cluster) {
                self.invalid(|| format!("refcount table entry {index} is invalid: {entry:#x}"));
            } else if entry != 0 && self.refer(entry / cluster, 1, "a refcount block") {
                let first = index as u64 * per_block;
                if first >= self.limit {
                    continue; // Covers nothing an entry may refer to.
                }
                refcounts.resize(first as usize, 0);
                let mut block = vec![0; cluster as usize];
                read_or_zero(self.file, self.path, entry, &mut block)?;
                refcounts.extend(
                    (0..per_block as usize).map(|at| refcount(&block, self.header.refcount_order, at)),
                );
            }
        }
        std::mem::swap(&mut self.references, references);
        Ok(refcounts)
    }

    fn compare(&mut self, references: &[u32], refcounts: &[u64]) {
        for cluster in 0..references.len().max(refcounts.len()) {
            let used = u64::from(references.get(cluster).copied().unwrap_or(0));
            let stored = refcounts.get(cluster).copied().unwrap_or(0);
            if stored < used {
                self.report.refcounts_too_low += 1;
                self.report.note(|| format!("cluster {cluster} has {used} users and refcount {stored}"));
            } else if stored > used {
                self.report.leaked_clusters += 1;
                self.report.note(|| format!("cluster {cluster} is leaked: {used} users, refcount {stored}"));
            }
        }
    }
}

/// Reads `count` big-endian entries; what lies past the end of the file reads as zeroes.
pub(crate) fn read_entries(file: &File, path: &Path, offset: u64, count: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    read_or_zero(file, path, offset, &mut bytes)?;
    let (entries, _) = bytes.as_chunks::<8>();
    Ok(entries.iter().map(|&entry| u64::from_be_bytes(entry)).collect())
}

fn read_or_zero(file: &File, path: &Path, mut offset: u64, mut bytes: &mut [u8]) -> Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => break,
            Ok(read) => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(BlockError::io("read the tables of", path, e)),
        }
    }
    Ok(())
}

/// Refcount number `at` of a block with refcounts of `1 << order` bits. Narrow ones fill bytes from the low end.
fn refcount(block: &[u8], order: u32, at: usize) -> u64 {
    let bits = 1usize << order;
    if bits < 8 {
        let bit = at * bits;
        return u64::from(block[bit / 8] >> (bit % 8)) & ((1 << bits) - 1);
    }
    let width = bits / 8;
    block[at * width..(at + 1) * width].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Stores a refcount as [`refcount`] reads it.
pub(crate) fn set_refcount(block: &mut [u8], order: u32, at: usize, value: u64) {
    let bits = 1usize << order;
    if bits < 8 {
        let bit = at * bits;
        let mask = (((1u16 << bits) - 1) as u8) << (bit % 8);
        block[bit / 8] = block[bit / 8] & !mask | (value as u8) << (bit % 8) & mask;
        return;
    }
    let width = bits / 8;
    block[at * width..(at + 1) * width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_stored_and_read() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let max = if order == 6 { u64::MAX } else { (1u64 << (1 << order)) - 1 };
            set_refcount(&mut block, order, 3, max);
            set_refcount(&mut block, order, 5, 1);
            let all: Vec<u64> = (0..8).map(|at| refcount(&block, order, at)).collect();
            assert_eq!(all, [0, 0, 0, max, 0, 1, 0, 0], "order {order}");
        }
    }
}
