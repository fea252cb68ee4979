//! The vCPUs of a new VM, on their way from nothing to paused threads: started fresh or from a saved state, in the one
//! order that works.
//!
//! What never enters: device models, boot protocols.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmove_devices::state::Sections;

use super::{Bus, Error, ExitListener, Hypervisor, Vcpu, VcpuState, Vm, VmState, cpuid};

/// vCPUs that exist in the kernel and nowhere else yet. Making them is slow (milliseconds each), so a machine that is
/// to be restored makes them before the state comes.
pub(crate) struct NewVcpus {
    hypervisor: Hypervisor,
    vm: Arc<Vm>,
    fds: Vec<VcpuFd>,
}

impl NewVcpus {
    /// Makes all vCPUs before the first is set up: interrupt messages between them need both ends.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) fn new(hypervisor: Hypervisor, vm: Arc<Vm>, vcpus: u8) -> Result<Self, Error> {
        let fds = (0..vcpus)
            .map(|id| vm.fd().create_vcpu(u64::from(id)).map_err(Error::call(format!("create vCPU {id}"))))
            .collect::<Result<_, _>>()?;
        Ok(Self { hypervisor, vm, fds })
    }

    /// Starts from nothing: the first vCPU gets the registers that `start` sets, the others wait to be started.
    ///
    /// # Errors
    /// [`Error::Call`] naming what KVM refused.
    pub(crate) fn start(
        self,
        start: impl FnOnce(&mut kvm_regs, &mut kvm_sregs),
        bus: &Arc<dyn Bus>,
        listener: &Arc<dyn ExitListener>,
    ) -> Result<Vec<Vcpu>, Error> {
        let mut start = Some(start);
        let vcpus = self.fds.len() as u8;
        for (id, fd) in (0_u8..).zip(&self.fds) {
            let failed = |what: &str| Error::call(format!("set {what} of vCPU {id}"));
            let cpuid = cpuid::for_vcpu(self.hypervisor.supported_cpuid(), id, vcpus)?;
            fd.set_cpuid2(&cpuid).map_err(failed("CPUID"))?;
            if let Some(start) = start.take() {
                let mut regs = fd.get_regs().map_err(failed("the registers"))?;
                let mut sregs = fd.get_sregs().map_err(failed("the control registers"))?;
                start(&mut regs, &mut sregs);
                fd.set_sregs(&sregs).map_err(failed("the control registers"))?;
                fd.set_regs(&regs).map_err(failed("the registers"))?;
            } else {
                // KVM makes every vCPU but the first so; said again, since it is what everything hangs on.
                fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED })
                    .map_err(failed("the run state"))?;
            }
        }
        self.spawn(bus, listener)
    }

    /// Goes on from a saved state, that of the VM first.
    ///
    /// # Errors
    /// As [`VcpuState::decode`] and [`VmState::decode`], [`Error::Features`], [`Error::Call`] naming what KVM refused.
    pub(crate) fn restore(
        self,
        sections: &mut Sections,
        bus: &Arc<dyn Bus>,
        listener: &Arc<dyn ExitListener>,
    ) -> Result<Vec<Vcpu>, Error> {
        let state = VmState::decode(sections)?;
        let states = (0..self.fds.len() as u8)
            .map(|id| VcpuState::decode(id, sections))
            .collect::<Result<Vec<_>, _>>()?;
        // One and the same for all clocks.
        let elapsed = state.elapsed();
        state.load(&self.vm, elapsed)?;
        for (state, fd) in states.iter().zip(&self.fds) {
            state.load(fd, &self.vm, &self.hypervisor, elapsed.as_nanos() as u64)?;
        }
        self.spawn(bus, listener)
    }

    fn spawn(self, bus: &Arc<dyn Bus>, listener: &Arc<dyn ExitListener>) -> Result<Vec<Vcpu>, Error> {
        let msrs: Arc<[u32]> = self.hypervisor.msrs().into();
        (0..)
            .zip(self.fds)
            .map(|(id, fd)| {
                let (vm, msrs) = (Arc::clone(&self.vm), Arc::clone(&msrs));
                Vcpu::spawn(id, fd, vm, msrs, Arc::clone(bus), Arc::clone(listener))
            })
            .collect()
    }
}
