//! The Linux guest of `fixtures/linux`: built once, found in the cache afterwards; VMs of it.
//!
//! Lives here: its files, its command line, its boot, its file system afterwards. Never enters: its network.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use crate::cluster::{Answer, Cluster};
use crate::console::Console;
use crate::guest::{DISK, VM};

/// RAM of a VM, MiB. More takes longer to set up where KVM emulates the kernel.
const MEMORY_MIB: u64 = 128;

/// Words of the kernel. The second line is for KVM without VT-x or AMD-V, which emulates the kernel, and does no harm elsewhere: what
/// the emulator does not know, or is slow at, is left alone. The last keeps the C library from what `noxsave` took away.
const WORDS: &str = "console=ttyS0 root=/dev/vda rw panic=-1 tsc=reliable mitigations=off rodata=off lpj=4000000 \
     noxsave clearcpuid=popcnt,smap,smep,umip,fsgsbase,pcid,erms,fsrm \
     GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX2,-AVX";

/// The guest's files.
#[derive(Debug)]
pub struct LinuxGuest {
    /// An ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// A qcow2 image of 64 MiB with an ext4 file system.
    pub rootfs: PathBuf,
    /// The private key that logs in as root.
    pub key: PathBuf,
}

impl LinuxGuest {
    /// The guest, built if it is not in the cache.
    pub fn get() -> &'static Self {
        static GUEST: OnceLock<LinuxGuest> = OnceLock::new();
        GUEST.get_or_init(|| {
            let rootfs = build("rootfs");
            Self {
                kernel: build("kernel").join("vmlinux"),
                rootfs: rootfs.join("rootfs.qcow2"),
                key: rootfs.join("id_ed25519"),
            }
        })
    }
}

/// The directory of a part, as `fixtures/linux/build` prints it.
fn build(part: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/linux/build");
    let output = Command::new(&script).arg(part).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {part}: {complaint}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
}

impl Cluster {
    /// Makes [`VM`] of the Linux guest on a host; `more` are further words of `vmove create`, `kernel_words` of the kernel's command line.
    pub fn create_linux(&self, host: &str, vcpus: u8, kernel_words: &str, more: &[&str]) -> Answer {
        let guest = LinuxGuest::get();
        let mut cmdline = WORDS.to_owned();
        // Writing to a String cannot fail.
        let _ = write!(cmdline, " {kernel_words}");
        let (vcpus, memory) = (vcpus.to_string(), format!("{MEMORY_MIB}MiB"));
        let disk = format!("name={DISK},from={}", guest.rootfs.display());
        let kernel = guest.kernel.display().to_string();
        let words = ["create", VM, "--vcpus", &vcpus, "--memory", &memory, "--cmdline", &cmdline];
        let files = ["--kernel", &kernel, "--disk", &disk];
        self.vmove(host, &[&words[..], &files, more].concat())
    }
}

/// Waits until the Linux guest under a console has booted and its shell waits for words. Only lines from `from` on count.
pub fn booted(console: &Console, from: usize) {
    let start = Instant::now();
    // In stages: where KVM emulates the kernel a boot takes half a minute on a machine that has nothing else to do.
    for stage in ["Kernel command line:", "TCP: Hash tables configured", "Run /sbin/init", "guest is up"] {
        console.wait(stage, |lines| lines[from..].iter().any(|line| line.contains(stage)).then_some(()));
    }
    println!("booted in {:.0} s", start.elapsed().as_secs_f64());
}

/// The ext4 file system on an image that nobody has open, as a raw file in `dir`. That it is clean is asserted, by e2fsprogs' word.
pub fn file_system_of(image: &Path, dir: &Path) -> PathBuf {
    let raw = dir.join("file-system.raw");
    run(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([image, &raw]));
    run(Command::new("/sbin/e2fsck").arg("-fn").arg(&raw));
    // A journal that is yet to be replayed is none of e2fsck's errors.
    let superblock = run(Command::new("/sbin/dumpe2fs").arg("-h").arg(&raw));
    assert!(!superblock.contains("needs_recovery"), "{superblock}");
    raw
}

/// A copy in `dir` of a file in a file system.
pub fn file_of(file_system: &Path, name: &str, dir: &Path) -> PathBuf {
    let copy = dir.join("file-of-the-guest");
    run(Command::new("/sbin/debugfs")
        .args(["-R", &format!("dump {name} {}", copy.display())])
        .arg(file_system));
    copy
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said));
    String::from_utf8_lossy(&said).into_owned()
}
