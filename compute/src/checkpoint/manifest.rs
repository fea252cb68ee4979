//! A checkpoint's first file: what is in the checkpoint, the saved state, and the sums of all other files.
//!
//! `magic 8 | version u32 | body length u64 | BLAKE3 of the body 32 | body (postcard)`, little endian. It is written last, so a
//! checkpoint without it is none. Untrusted on the way in: it may come from another host or have lain on a disk for years.
//! Lives here: the layout, checks. Never enters: files, machines.

use std::io::Read;

use serde::{Deserialize, Serialize};

use super::{CheckpointError, sums::FileSums};
use crate::process::protocol::VmDefinition;

/// Versions, one line each on what changed.
///
/// 1: first version.
const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"VMOVECKP";
/// Largest body, bytes: the sums of some 15 TiB of data.
const MAX_BODY: u64 = 1 << 29;
/// Most disks.
const MAX_DISKS: usize = 64;

/// Name of this file in a checkpoint's directory.
pub const MANIFEST: &str = "checkpoint";
/// RAM: page i of the guest at byte `4096 * i`.
pub const RAM: &str = "ram";
/// The kernel.
pub const KERNEL: &str = "kernel";
/// The initial RAM disk.
pub const INITRD: &str = "initrd";

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its name, unique for the VM.
    pub name: String,
    /// The VM as it was.
    pub vm: VmDefinition,
    /// Host it was taken on.
    pub host: String,
    /// The VM's ownership generation then.
    pub generation: u64,
    /// When, in seconds since 1970.
    pub taken_at: u64,
    /// How long the guest stood still for it, us.
    pub pause_us: u64,
    /// Sums of RAM.
    pub ram: FileSums,
    /// Sums of the disks' images, in the order of the definition.
    pub disks: Vec<FileSums>,
    /// Sums of the kernel.
    pub kernel: FileSums,
    /// Sums of the initial RAM disk.
    pub initrd: Option<FileSums>,
    /// The saved state, as a move carries it.
    pub state: Vec<u8>,
}

/// What is encoded. The definition as JSON, which says by itself what it has.
#[derive(Serialize, Deserialize)]
struct Body {
    name: String,
    vm: String,
    host: String,
    generation: u64,
    taken_at: u64,
    pause_us: u64,
    ram: FileSums,
    disks: Vec<FileSums>,
    kernel: FileSums,
    initrd: Option<FileSums>,
    state: Vec<u8>,
}

impl Manifest {
    /// Bytes before the body.
    pub const HEAD_BYTES: usize = 52;

    /// Name of the file of disk number `index`.
    pub fn disk_file(index: usize) -> String {
        format!("disk-{index}")
    }

    /// All other files of the checkpoint with their sums.
    pub fn files(&self) -> Vec<(String, &FileSums)> {
        let mut files = vec![(RAM.to_owned(), &self.ram), (KERNEL.to_owned(), &self.kernel)];
        files.extend(self.initrd.as_ref().map(|sums| (INITRD.to_owned(), sums)));
        files.extend(self.disks.iter().enumerate().map(|(index, sums)| (Self::disk_file(index), sums)));
        files
    }

    /// The file's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        let refused = |e: &dyn std::fmt::Display| CheckpointError::Damaged(format!("cannot be written: {e}"));
        let this = self.clone();
        let body = Body {
            name: this.name,
            vm: serde_json::to_string(&self.vm).map_err(|e| refused(&e))?,
            host: this.host,
            generation: this.generation,
            taken_at: this.taken_at,
            pause_us: this.pause_us,
            ram: this.ram,
            disks: this.disks,
            kernel: this.kernel,
            initrd: this.initrd,
            state: this.state,
        };
        let body = postcard::to_stdvec(&body).map_err(|e| refused(&e))?;
        let mut out = Vec::with_capacity(Self::HEAD_BYTES + body.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(blake3::hash(&body).as_bytes());
        out.extend(body);
        Ok(out)
    }

    /// Reads a checkpoint's first file; nothing of it is believed before its sum is right, and nothing left over is allowed.
    pub fn decode(mut from: impl Read) -> Result<Self, CheckpointError> {
        let damaged = |what: &str| CheckpointError::Damaged(what.to_owned());
        let mut head = [0; Self::HEAD_BYTES];
        from.read_exact(&mut head).map_err(|_| damaged("it is too short for a checkpoint"))?;
        let (magic, rest) = head.split_at(8);
        let (version, rest) = rest.split_at(4);
        let (length, sum) = rest.split_at(8);
        if magic != MAGIC {
            return Err(damaged("it is no checkpoint"));
        }
        let version = version.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        if version != VERSION {
            return Err(CheckpointError::Damaged(format!(
                "it is a checkpoint of version {version}; this program reads version {VERSION}"
            )));
        }
        let length = length.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        if length > MAX_BODY {
            return Err(CheckpointError::Damaged(format!(
                "a body of {length} bytes is more than {MAX_BODY}"
            )));
        }
        let mut body = Vec::new();
        from.take(length + 1).read_to_end(&mut body).map_err(|e| CheckpointError::Damaged(e.to_string()))?;
        if body.len() as u64 != length || blake3::hash(&body).as_bytes() != sum {
            return Err(damaged("it is torn or damaged"));
        }
        Self::decode_body(&body)
    }

    /// Reads what stands behind the sum.
    pub fn decode_body(bytes: &[u8]) -> Result<Self, CheckpointError> {
        match postcard::take_from_bytes::<Body>(bytes) {
            Ok((body, [])) => Self::checked(body),
            _ => Err(CheckpointError::Damaged("its content is not that of a checkpoint".to_owned())),
        }
    }

    fn checked(body: Body) -> Result<Self, CheckpointError> {
        let vm: VmDefinition = serde_json::from_str(&body.vm)
            .map_err(|e| CheckpointError::Damaged(format!("its definition of the VM: {e}")))?;
        let this = Self {
            name: body.name,
            vm,
            host: body.host,
            generation: body.generation,
            taken_at: body.taken_at,
            pause_us: body.pause_us,
            ram: body.ram,
            disks: body.disks,
            kernel: body.kernel,
            initrd: body.initrd,
            state: body.state,
        };
        if this.disks.len() > MAX_DISKS || this.disks.len() != this.vm.disks.len() {
            return Err(CheckpointError::Damaged(format!(
                "{} disks of {}",
                this.disks.len(),
                this.vm.disks.len()
            )));
        }
        if Some(this.ram.bytes) != this.vm.memory_mib.checked_mul(1 << 20) {
            return Err(CheckpointError::Damaged(format!("{} bytes of RAM", this.ram.bytes)));
        }
        this.files().into_iter().try_for_each(|(file, sums)| sums.check(&file))?;
        Ok(this)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A checkpoint of a VM without disks whose files are empty.
    pub fn example() -> Manifest {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let sums = FileSums::of(&path).unwrap();
        Manifest {
            name: "before".into(),
            vm: serde_json::from_str(r#"{"name": "web", "memory_mib": 1}"#).unwrap(),
            host: "a".into(),
            generation: 3,
            taken_at: 1_700_000_000,
            pause_us: 12,
            ram: sums.clone(),
            disks: vec![],
            kernel: sums,
            initrd: None,
            state: vec![1, 2, 3],
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let manifest = example();
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()[..]).unwrap(), manifest);
        let files: Vec<String> = manifest.files().into_iter().map(|(name, _)| name).collect();
        assert_eq!(files, [RAM, KERNEL]);
    }

    #[test]
    fn foreign_newer_and_contradicting_files_are_named() {
        let good = example().encode().unwrap();
        let refused = |bytes: &[u8]| Manifest::decode(bytes).unwrap_err().to_string();
        assert!(
            refused(b"QFI\xfb and so on and so on, for more than fifty-two bytes.").contains("no checkpoint")
        );
        let mut newer = good.clone();
        newer[8] = 2;
        assert!(refused(&newer).contains("version 2"));
        let mut huge = good.clone();
        huge[12..20].fill(0xff);
        assert!(refused(&huge).contains("more than"));
        let other_ram = Manifest { vm: VmDefinition { memory_mib: 2, ..example().vm }, ..example() };
        assert!(refused(&other_ram.encode().unwrap()).contains("bytes of RAM"));
        let more_disks = Manifest { disks: vec![example().ram], ..example() };
        assert!(refused(&more_disks.encode().unwrap()).contains("1 disks of 0"));
    }

    proptest! {
        #[test]
        fn torn_and_flipped_files_are_refused(cut in any::<usize>(), bit in any::<usize>()) {
            let good = example().encode().unwrap();
            prop_assert!(Manifest::decode(&good[..cut % good.len()]).is_err());
            let mut long = good.clone();
            long.push(0);
            prop_assert!(Manifest::decode(&long[..]).is_err());
            let mut flipped = good.clone();
            let bit = bit % (good.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Manifest::decode(&flipped[..]).is_err());
        }

        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::decode(&bytes[..]);
            // Behind a right head and sum, too.
            let mut file = MAGIC.to_vec();
            file.extend(VERSION.to_le_bytes());
            file.extend((bytes.len() as u64).to_le_bytes());
            file.extend(blake3::hash(&bytes).as_bytes());
            file.extend(&bytes);
            let _ = Manifest::decode(&file[..]);
        }
    }
}
