//! What a guest's CPUID says: the host's supported leaves, less what cannot be moved, plus the VM's own topology.
//!
//! What never enters: decisions on whether a host fits (see `features`). On a host whose KVM does not virtualize
//! CPUID all this is ignored by the guest, so nothing may depend on a cleared bit alone.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::Error;

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;

/// Clears what a guest here must not use, in the order of leaves of the Intel SDM vol. 2, CPUID.
pub(super) fn filter(cpuid: &mut CpuId, tsc_deadline: bool) {
    cpuid.retain(|entry| {
        // SGX, AMX tiles, and the XSAVE components of AMX (17, 18): they need permissions and state of their own.
        !matches!((entry.function, entry.index), (0x12 | 0x1d | 0x1e, _) | (0xd, 17 | 18))
    });
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                // No nested virtualization (VMX), no performance counters (PDCM): their state is not moved.
                entry.ecx &= !(1 << 5 | 1 << 15);
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
            }
            // Power management: only "the APIC timer always runs" is true of a guest.
            (6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0),
            (7, 0) => {
                entry.ebx &= !(1 << 2);
                entry.ecx &= !(1 << 30);
                entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25);
            }
            // Architectural performance monitoring, Intel and AMD.
            (0xa | 0x8000_0022, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0xd, 0) => entry.eax &= !(1 << 17 | 1 << 18),
            // KVM's asynchronous page faults (bits 4, 10, 14) keep state in the host that does not move.
            (0x4000_0001, _) => entry.eax &= !(1 << 4 | 1 << 10 | 1 << 14),
            // SVM, and the AMD topology leaves that `for_vcpu` does not write (TOPOEXT, PerfCtrExtCore and NB).
            (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 22 | 1 << 23 | 1 << 24),
            _ => {}
        }
    }
}

/// The CPUID of one vCPU: one package, one thread a core, APIC id = number of the vCPU.
///
/// # Errors
/// [`Error::BadState`] if there are more leaves than KVM takes.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> Result<CpuId, Error> {
    let id = u32::from(id);
    let count = u32::from(vcpus);
    // Bits of an APIC id that number the cores.
    let width = count.next_power_of_two().trailing_zeros();
    let many = u32::from(vcpus > 1);
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).copied().collect();
    let topology: Vec<u32> = [0xb, 0x1f]
        .into_iter()
        .filter(|leaf| supported.as_slice().iter().any(|entry| entry.function == *leaf))
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | (1 << width) << 16 | id << 24;
                entry.edx = entry.edx & !(1 << 28) | many << 28;
            }
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << width) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << width) - 1) << 26;
            }
            0x8000_0001 => entry.ecx = entry.ecx & !2 | many << 1,
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | width << 12 | (count - 1),
            _ => {}
        }
    }
    for leaf in topology {
        // Level types: 1 = thread, 2 = core (SDM vol. 2, leaves 0BH and 1FH).
        for (index, shift, below, kind) in [(0, 0, 1, 1), (1, width, count, 2), (2, 0, 0, 0)] {
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: below,
                ecx: kind << 8 | index,
                edx: id,
                ..Default::default()
            });
        }
    }
    from_entries(&entries)
}

/// Leaves as KVM wants them.
///
/// # Errors
/// [`Error::BadState`] if there are more than KVM takes.
pub(super) fn from_entries(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, Error> {
    let refuse =
        || Error::BadState(format!("{} CPUID leaves, KVM takes {KVM_MAX_CPUID_ENTRIES}", entries.len()));
    if entries.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(refuse());
    }
    CpuId::from_entries(entries).map_err(|_| refuse())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn what_does_not_move_is_hidden() {
        let mut cpuid =
            CpuId::from_entries(&[leaf(1, 0, u32::MAX), leaf(0x12, 0, 1), leaf(0xa, 0, 7)]).unwrap();
        filter(&mut cpuid, false);
        assert_eq!(get(&cpuid, 1, 0).ecx & (1 << 5), 0, "VMX");
        assert_eq!(get(&cpuid, 0xa, 0).eax, 0);
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x12));
    }

    #[test]
    fn the_guest_is_told_of_a_hypervisor_and_a_deadline_timer() {
        let mut cpuid = CpuId::from_entries(&[leaf(1, 0, 0)]).unwrap();
        filter(&mut cpuid, true);
        assert_eq!(get(&cpuid, 1, 0).ecx, HYPERVISOR | TSC_DEADLINE);
    }

    #[test]
    fn topology_is_that_of_the_vm() {
        let host = CpuId::from_entries(&[leaf(1, 0, 0), leaf(0xb, 0, 99), leaf(0xb, 1, 99)]).unwrap();
        let cpuid = for_vcpu(&host, 2, 3).unwrap();
        let basic = get(&cpuid, 1, 0);
        assert_eq!((basic.ebx >> 24, basic.ebx >> 16 & 0xff, basic.edx >> 28 & 1), (2, 4, 1));
        let core = get(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!(get(&cpuid, 0xb, 0).ecx, 0x100);
        let alone = for_vcpu(&host, 0, 1).unwrap();
        assert_eq!(get(&alone, 1, 0).edx >> 28 & 1, 0);
    }
}
