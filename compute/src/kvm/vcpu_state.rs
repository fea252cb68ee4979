//! The state of one vCPU: read from KVM, saved as a section, and loaded into a new vCPU.
//!
//! What never enters: the VM's interrupt controllers and clock (see `state`), threads.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmove_devices::state::{Section, Sections};

use super::{Error, Hypervisor, Vm, cpuid, features, xsave};
use crate::memory::PAGE_SIZE;

const VERSION: u16 = 1;
/// Most MSRs in a saved state; KVM lists fewer than 300.
const MAX_MSRS: usize = 1024;
/// Largest XSAVE area in a saved state, bytes; 11 KiB with every component of today's CPUs.
const MAX_XSAVE: usize = 64 << 10;
/// Part of the XSAVE area that every CPU has: legacy area and header (Intel SDM vol. 1, 13.4).
const XSAVE_BASE: usize = 576;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Setting one makes KVM write the time into guest RAM. The guest's RAM comes with its own bytes and must stay as it
/// was sent, so they are left out; a guest writes them anew whenever it wants to know the time.
const MSR_KVM_WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
/// kvmclock (old and new), stolen time, end of interrupt: bit 0 switches on, the rest is where KVM shares a page.
const MSR_KVM_SHARED_PAGES: [u32; 4] = [0x12, 0x4b56_4d01, 0x4b56_4d03, 0x4b56_4d04];

/// Everything KVM knows about one vCPU. Plain and public: untrusted until [`VcpuState::load`].
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// Number of the vCPU.
    pub id: u8,
    /// What CPUID said to the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// TSC frequency, kHz; 0 if the host does not know.
    pub tsc_khz: u32,
    /// Runnable, halted, or waiting for its start-up message.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers.
    pub sregs: kvm_sregs,
    /// FPU and vector registers as XSAVE lays them out.
    pub xsave: Vec<u8>,
    /// Which of them are in use.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Exceptions and interrupts on their way.
    pub events: kvm_vcpu_events,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is out of the guest with no I/O pending.
    pub(super) fn read(id: u8, fd: &VcpuFd, vm: &Vm, msrs: &[u32]) -> Result<Self, Error> {
        let failed = |what: &str| Error::call(format!("read {what} of vCPU {id}"));
        // mp_state first: reading it makes KVM deliver pending INIT and SIPI messages, which changes registers.
        let mp_state = fd.get_mp_state().map_err(failed("the run state"))?;
        Ok(Self {
            id,
            cpuid: fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("CPUID"))?.as_slice().to_vec(),
            // EIO on a host with an unstable TSC.
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            mp_state,
            regs: fd.get_regs().map_err(failed("the registers"))?,
            sregs: fd.get_sregs().map_err(failed("the control registers"))?,
            xsave: xsave::read(fd, vm.xsave_bytes()).map_err(failed("the FPU"))?,
            xcrs: fd.get_xcrs().map_err(failed("XCR0"))?,
            debugregs: fd.get_debug_regs().map_err(failed("the debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("the local APIC"))?,
            msrs: read_msrs(fd, msrs).map_err(failed("the MSRs"))?,
            // Last: what the calls above do to pending events is in.
            events: fd.get_vcpu_events().map_err(failed("pending events"))?,
        })
    }

    /// The state as a section of its own.
    ///
    /// # Errors
    /// [`Error::Section`].
    pub fn encode(&self) -> Result<Section, Error> {
        Ok(Section::encode(section_name(self.id), VERSION, self)?)
    }

    /// Takes the state of vCPU `id` and checks everything that KVM will not.
    ///
    /// # Errors
    /// [`Error::Section`] or [`Error::BadState`].
    pub fn decode(id: u8, sections: &mut Sections) -> Result<Self, Error> {
        let state: Self = sections.take(&section_name(id), VERSION)?;
        let refuse = |what: String| Err(Error::BadState(format!("vCPU {id}: {what}")));
        if state.id != id {
            return refuse(format!("the section is that of vCPU {}", state.id));
        }
        if state.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return refuse(format!("{} CPUID leaves", state.cpuid.len()));
        }
        if state.msrs.len() > MAX_MSRS {
            return refuse(format!("{} MSRs", state.msrs.len()));
        }
        if !(XSAVE_BASE..=MAX_XSAVE).contains(&state.xsave.len()) {
            return refuse(format!("an FPU state of {} bytes", state.xsave.len()));
        }
        if state.xcrs.nr_xcrs as usize > state.xcrs.xcrs.len() {
            return refuse(format!("{} extended control registers", state.xcrs.nr_xcrs));
        }
        Ok(state)
    }

    /// Puts the state into a new vCPU. `elapsed_ns` is the time since it was saved, by which the TSC goes forward.
    ///
    /// # Errors
    /// [`Error::Features`] if this host cannot be what the guest's CPU was, [`Error::BadState`] or [`Error::Call`]
    /// naming what KVM refused.
    pub(super) fn load(
        &self,
        fd: &VcpuFd,
        vm: &Vm,
        hypervisor: &Hypervisor,
        elapsed_ns: u64,
    ) -> Result<(), Error> {
        let failed = |what: &str| Error::call(format!("set {what} of vCPU {}", self.id));
        let here = features::offered(hypervisor, fd)?;
        let missing: Vec<_> = features::names(&self.cpuid).difference(&here).cloned().collect();
        if !missing.is_empty() {
            return Err(Error::Features(missing.join(", ")));
        }
        fd.set_cpuid2(&cpuid::from_entries(&self.cpuid)?).map_err(failed("CPUID"))?;
        self.load_tsc_rate(fd);
        fd.set_sregs(&self.sregs).map_err(failed("the control registers"))?;
        fd.set_regs(&self.regs).map_err(failed("the registers"))?;
        fd.set_xcrs(&self.xcrs).map_err(failed("XCR0"))?;
        if !xsave::write(fd, vm.xsave_bytes(), &self.xsave).map_err(failed("the FPU"))? {
            return Err(Error::BadState(format!("vCPU {}: FPU components that this host lacks", self.id)));
        }
        // Before the MSRs: loading the APIC clears the deadline timer, which is one of them.
        fd.set_lapic(&self.lapic).map_err(failed("the local APIC"))?;
        let kept = self.keep_shared_pages(vm);
        self.load_msrs(fd, hypervisor.msrs(), elapsed_ns)?;
        for (gpa, page) in kept {
            vm.ram()
                .memory()
                .write_slice(&page, gpa)
                .map_err(|_| Error::BadState(format!("vCPU {}: a shared page outside RAM", self.id)))?;
        }
        fd.set_mp_state(self.mp_state).map_err(failed("the run state"))?;
        fd.set_debug_regs(&self.debugregs).map_err(failed("the debug registers"))?;
        fd.set_vcpu_events(&self.events).map_err(failed("pending events"))
    }

    /// The guest keeps its TSC frequency where the host can scale; else kvmclock alone is right.
    fn load_tsc_rate(&self, fd: &VcpuFd) {
        let here = fd.get_tsc_khz().unwrap_or(0);
        // KVM's own tolerance for running a guest without scaling is 250 ppm.
        if self.tsc_khz != 0
            && here.abs_diff(self.tsc_khz) > here / 4000
            && let Err(error) = fd.set_tsc_khz(self.tsc_khz)
        {
            tracing::warn!(vcpu = self.id, from = self.tsc_khz, to = here, %error, "the TSC rate changes");
        }
    }

    /// The pages that KVM may write to as soon as it is told of them, as they are now. RAM must stay as it was sent until
    /// the guest runs: it is compared with the source's. KVM writes them again before it enters the guest.
    fn keep_shared_pages(&self, vm: &Vm) -> Vec<(GuestAddress, Vec<u8>)> {
        self.msrs
            .iter()
            .filter(|entry| MSR_KVM_SHARED_PAGES.contains(&entry.index) && entry.data & 1 != 0)
            .filter_map(|entry| {
                let gpa = GuestAddress(entry.data / PAGE_SIZE * PAGE_SIZE);
                let mut page = vec![0; PAGE_SIZE as usize];
                // Outside RAM there is nothing to keep.
                vm.ram().memory().read_slice(&mut page, gpa).ok().map(|()| (gpa, page))
            })
            .collect()
    }

    /// An MSR that this host does not have or does not take is skipped: a guest that needs it uses a CPU feature, and
    /// those were compared.
    fn load_msrs(&self, fd: &VcpuFd, known: &[u32], elapsed_ns: u64) -> Result<(), Error> {
        let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        let mut entries: Vec<_> = self
            .msrs
            .iter()
            .filter(|entry| known.contains(&entry.index) && !MSR_KVM_WALL_CLOCKS.contains(&entry.index))
            .copied()
            .collect();
        for entry in &mut entries {
            if entry.index == MSR_TSC {
                entry.data = entry.data.wrapping_add(ticks as u64);
            }
        }
        // The TSC, which others are compared with, first; the deadline, which is compared with it, last.
        entries.sort_by_key(|entry| match entry.index {
            MSR_TSC => 0,
            MSR_TSC_DEADLINE => 2,
            _ => 1,
        });
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let list = Msrs::from_entries(batch)
                .map_err(|_| Error::BadState(format!("vCPU {}: too many MSRs", self.id)))?;
            let set = fd.set_msrs(&list).map_err(Error::call(format!("set the MSRs of vCPU {}", self.id)))?;
            rest = &rest[set.min(rest.len())..];
            if set < batch.len() {
                let refused = &rest[0];
                if refused.data != 0 {
                    tracing::warn!(
                        vcpu = self.id,
                        msr = format_args!("{:#x}", refused.index),
                        "this host does not take an MSR of the guest"
                    );
                }
                rest = &rest[1..];
            }
        }
        Ok(())
    }
}

fn section_name(id: u8) -> String {
    format!("kvm/vcpu{id}")
}

fn read_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let wanted: Vec<_> =
        indexes.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut list = Msrs::from_entries(batch).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let got = fd.get_msrs(&mut list)?.min(batch.len());
        values.extend_from_slice(&list.as_slice()[..got]);
        // One that KVM lists but does not read (it stops there) is no state of this guest.
        rest = &rest[(got + usize::from(got < batch.len())).min(rest.len())..];
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank() -> VcpuState {
        VcpuState {
            id: 0,
            cpuid: Vec::new(),
            tsc_khz: 0,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: vec![0; 4096],
            xcrs: kvm_xcrs::default(),
            debugregs: kvm_debugregs::default(),
            events: kvm_vcpu_events::default(),
            lapic: kvm_lapic_state::default(),
            msrs: Vec::new(),
        }
    }

    fn decode(change: impl FnOnce(&mut VcpuState)) -> Result<VcpuState, Error> {
        let mut state = blank();
        change(&mut state);
        VcpuState::decode(0, &mut Sections::new(vec![Section::encode("kvm/vcpu0", VERSION, &state)?])?)
    }

    #[test]
    fn sane_states_pass() {
        let state = decode(|state| state.regs.rip = 77).unwrap();
        assert_eq!(state.regs.rip, 77);
    }

    #[test]
    fn insane_states_are_refused() {
        assert!(decode(|state| state.id = 1).is_err());
        assert!(decode(|state| state.cpuid = vec![kvm_cpuid_entry2::default(); 257]).is_err());
        assert!(decode(|state| state.msrs = vec![kvm_msr_entry::default(); MAX_MSRS + 1]).is_err());
        assert!(decode(|state| state.xsave.clear()).is_err());
        assert!(decode(|state| state.xsave = vec![0; MAX_XSAVE + 1]).is_err());
        assert!(decode(|state| state.xcrs.nr_xcrs = 17).is_err());
    }
}
