//! CPU features by name, for the question whether a guest that runs here can run there.
//!
//! What never enters: what to do about a missing one.

use std::collections::BTreeSet;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use super::{Error, Hypervisor};

/// Which register of a leaf.
#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// One register of feature bits: leaf, index, register, (bit, name) pairs.
type Word = (u32, u32, Register, &'static [(u32, &'static str)]);

/// Feature bits of user-visible instructions and of kernel features that a guest picks at boot. Bits from the Intel
/// SDM vol. 2 (CPUID) and the AMD APM vol. 3 (appendix E), names as in Linux' `/proc/cpuinfo`.
const WORDS: &[Word] = &[
    (
        1,
        0,
        Edx,
        &[
            (0, "fpu"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (8, "cx8"),
            (9, "apic"),
            (11, "sep"),
            (12, "mtrr"),
            (13, "pge"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    (
        1,
        0,
        Ecx,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc_deadline_timer"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        7,
        0,
        Ebx,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (
        7,
        0,
        Ecx,
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (27, "movdiri"),
            (28, "movdir64b"),
        ],
    ),
    (
        7,
        0,
        Edx,
        &[
            (4, "fsrm"),
            (8, "avx512_vp2intersect"),
            (14, "serialize"),
            (23, "avx512_fp16"),
            (26, "spec_ctrl"),
            (27, "intel_stibp"),
            (28, "flush_l1d"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    ),
    (7, 1, Eax, &[(4, "avx_vnni"), (5, "avx512_bf16")]),
    (0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")]),
    (0x8000_0001, 0, Edx, &[(11, "syscall"), (20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")]),
    (
        0x8000_0001,
        0,
        Ecx,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
        ],
    ),
    (
        0x8000_0008,
        0,
        Ebx,
        &[(0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"), (15, "stibp")],
    ),
    (0x4000_0001, 0, Eax, &[(3, "kvmclock"), (5, "kvm_steal_time"), (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt")]),
    (
        0x4000_0001,
        0,
        Eax,
        &[(9, "kvm_tlb_flush"), (11, "kvm_send_ipi"), (13, "kvm_sched_yield"), (24, "kvmclock_stable")],
    ),
];

/// The names of the features that these leaves offer.
pub(super) fn names(leaves: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (function, index, register, bits) in WORDS {
        let Some(leaf) = leaves.iter().find(|leaf| leaf.function == *function && leaf.index == *index) else {
            continue;
        };
        let word = match register {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        };
        names.extend(bits.iter().filter(|(bit, _)| word & 1 << bit != 0).map(|(_, name)| (*name).to_owned()));
    }
    names
}

/// The names of the features that a guest on this vCPU is offered when it is given all that the host supports.
///
/// Asked of a vCPU, since there are hosts whose KVM says it supports less than every guest sees there. Leaves the vCPU
/// with that CPUID.
///
/// # Errors
/// [`Error::Call`].
pub(super) fn offered(hypervisor: &Hypervisor, vcpu: &VcpuFd) -> Result<BTreeSet<String>, Error> {
    vcpu.set_cpuid2(hypervisor.supported_cpuid()).map_err(Error::call("set the CPUID of a vCPU"))?;
    let seen = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(Error::call("read the CPUID of a vCPU"))?;
    Ok(names(seen.as_slice()))
}

/// The CPU features that a guest gets on this host, named as in `/proc/cpuinfo` (KVM's own begin with `kvm`). Makes a
/// VM to find out: some milliseconds.
///
/// # Errors
/// As [`Hypervisor::open`], or [`Error::Call`].
pub fn host_features() -> Result<BTreeSet<String>, Error> {
    let hypervisor = Hypervisor::open()?;
    let vm = hypervisor.kvm().create_vm().map_err(Error::call("create a VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(Error::call("create a vCPU"))?;
    offered(&hypervisor, &vcpu)
}

/// Those of `required` that this host does not offer, names it does not know included.
///
/// # Errors
/// As [`host_features`].
pub fn missing_features(required: &BTreeSet<String>) -> Result<BTreeSet<String>, Error> {
    Ok(required.difference(&host_features()?).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_names() {
        let leaf = kvm_cpuid_entry2 { function: 1, edx: 1 << 26, ecx: 1 << 28, ..Default::default() };
        let expected: BTreeSet<String> = ["sse2", "avx"].map(str::to_owned).into();
        assert_eq!(names(&[leaf]), expected);
    }

    #[test]
    fn no_name_stands_for_two_bits() {
        let all: Vec<_> = WORDS.iter().flat_map(|word| word.3).map(|(_, name)| *name).collect();
        assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len());
    }
}
