//! Puts refcounts right after an unclean end: new refcount structures from what the tables refer to.
//!
//! The tables (L1, L2) are never questioned here; an image whose tables are invalid is refused. The order of writes
//! makes a crash at any point harmless: everything new is written to unused clusters and synced before the header
//! turns to it, and the dirty mark goes last.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::check::{COPIED, CheckReport, Scan, set_refcount};
use crate::error::{BlockError, Result};
use crate::header::Header;
use crate::lock::{ImageLock, LockMode};

/// Place of `refcount_table_offset` and `refcount_table_clusters` in a header.
const HEADER_REFCOUNT_TABLE: u64 = 48;
/// Place of the incompatible features in a version 3 header.
pub(crate) const HEADER_INCOMPATIBLE: u64 = 72;
/// Place of the autoclear features in a version 3 header.
const HEADER_AUTOCLEAR: u64 = 88;

/// Checks the qcow2 image at `path`, rebuilds its refcounts if they are wrong, and removes the dirty and corrupt
/// marks. The report tells what was found before.
///
/// # Errors
/// When the image is in use or cannot be written. Invalid table entries are in the report, which then does not say
/// `repaired`: nothing was changed.
pub fn repair(path: &Path) -> Result<CheckReport> {
    let _lock = ImageLock::take(path, LockMode::Write)?;
    repair_locked(path)
}

/// As [`repair`], for a caller that holds the write lock.
pub(crate) fn repair_locked(path: &Path) -> Result<CheckReport> {
    let file =
        OpenOptions::new().read(true).write(true).open(path).map_err(|e| BlockError::io("open", path, e))?;
    let mut scan = Scan::run(&file, path)?;
    if scan.report.invalid_entries > 0 {
        return Ok(scan.report);
    }
    let report = &scan.report;
    let rebuild = report.has_errors() || report.leaked_clusters > 0;
    if rebuild || report.dirty || report.corrupt {
        let plan =
            if rebuild { Some(Rebuilt::plan(&scan.header, &mut scan.references, path)?) } else { None };
        write(&file, &scan, plan.as_ref()).map_err(|e| BlockError::io("repair", path, e))?;
        scan.report.repaired = true;
    }
    Ok(scan.report)
}

/// New refcount structures and where they go.
struct Rebuilt {
    table_offset: u64,
    table: Vec<u8>,
    blocks_offset: u64,
    blocks: Vec<u8>,
    table_clusters: u32,
}

impl Rebuilt {
    /// Lays the new structures behind everything that is referred to or was ever written. Their own clusters are
    /// counted in `references`; those of the old structures end up free.
    fn plan(header: &Header, references: &mut Vec<u32>, path: &Path) -> Result<Self> {
        let cluster = header.cluster_bytes();
        let per_block = (cluster * 8) >> header.refcount_order;
        let start = references.len() as u64;
        let (mut table_clusters, mut blocks) = (1u64, 1u64);
        loop {
            let needed_blocks = (start + table_clusters + blocks).div_ceil(per_block);
            let needed_table = (needed_blocks * 8).div_ceil(cluster);
            if needed_blocks <= blocks && needed_table <= table_clusters {
                break;
            }
            (blocks, table_clusters) = (needed_blocks.max(blocks), needed_table.max(table_clusters));
        }
        references.resize((start + table_clusters + blocks) as usize, 1);
        let max = if header.refcount_order == 6 { u64::MAX } else { (1 << (1 << header.refcount_order)) - 1 };
        let mut bytes = vec![0; (blocks * cluster) as usize];
        for (index, &count) in references.iter().enumerate() {
            let count = u64::from(count);
            if count > max {
                let reason = format!("cluster {index} has {count} users, more than its refcounts can hold");
                return Err(BlockError::Damaged { path: path.to_path_buf(), reason });
            }
            // Blocks are contiguous and refcounts fill them without gaps, so one index runs through all.
            set_refcount(&mut bytes, header.refcount_order, index, count);
        }
        let blocks_offset = (start + table_clusters) * cluster;
        let mut table: Vec<u8> =
            (0..blocks).flat_map(|block| (blocks_offset + block * cluster).to_be_bytes()).collect();
        table.resize((table_clusters * cluster) as usize, 0);
        Ok(Self {
            table_offset: start * cluster,
            table,
            blocks_offset,
            blocks: bytes,
            table_clusters: table_clusters as u32,
        })
    }
}

fn write(file: &File, scan: &Scan, rebuilt: Option<&Rebuilt>) -> std::io::Result<()> {
    for mark in &scan.wrong_marks {
        file.write_all_at(&(mark.entry ^ COPIED).to_be_bytes(), mark.at)?;
    }
    if let Some(rebuilt) = rebuilt {
        file.write_all_at(&rebuilt.blocks, rebuilt.blocks_offset)?;
        file.write_all_at(&rebuilt.table, rebuilt.table_offset)?;
        file.sync_data()?;
        let mut pointer = rebuilt.table_offset.to_be_bytes().to_vec();
        pointer.extend(rebuilt.table_clusters.to_be_bytes());
        file.write_all_at(&pointer, HEADER_REFCOUNT_TABLE)?;
    }
    if scan.header.version >= 3 {
        if rebuilt.is_some() {
            // Bitmaps and the like are not walked, so their clusters are free now; the format lets us say so.
            file.write_all_at(&[0; 8], HEADER_AUTOCLEAR)?;
        }
        file.sync_data()?;
        // Only these two marks are ever set in an image that gets here.
        file.write_all_at(&[0; 8], HEADER_INCOMPATIBLE)?;
    }
    file.sync_data()
}
