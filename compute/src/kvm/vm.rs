//! One VM: its kernel object with interrupt controllers and timer, and its RAM as memory slots.
//!
//! What never enters: vCPU threads, device models. The small traits that device models need of a hypervisor
//! are implemented here.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap,
    kvm_msi, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;
use vmove_devices::{Doorbells, InterruptLine, MsiSender};

use super::{Error, Hypervisor};
use crate::memory::{self, GuestRam};

/// Three pages that VT-x needs for real mode, and the page before them for its identity map: at the end of the
/// 32-bit space, above the I/O APIC and below the firmware's reset vector, where neither RAM nor a BAR can be.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A VM of KVM together with the RAM it maps.
pub struct Vm {
    // Before `ram`: the kernel lets go of the mapping first.
    fd: VmFd,
    ram: GuestRam,
    xsave_bytes: usize,
}

impl Vm {
    /// Makes a VM with in-kernel interrupt controllers and timer, and with `ram` in its address space.
    ///
    /// # Errors
    /// [`Error::Call`] naming the step that KVM refused.
    pub fn new(hypervisor: &Hypervisor, ram: GuestRam) -> Result<Arc<Self>, Error> {
        let fd = hypervisor.kvm().create_vm().map_err(Error::call("create a VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(Error::call("place the identity map"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(Error::call("place the TSS"))?;
        fd.create_irq_chip().map_err(Error::call("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(Error::call("create the timer"))?;
        if fd.check_extension_raw(u64::from(KVM_CAP_EXIT_ON_EMULATION_FAILURE)) > 0 {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                args: [1, 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&cap).map_err(Error::call("ask for exits on emulation failures"))?;
        }
        let xsave_bytes = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096);
        let vm = Self { fd, ram, xsave_bytes };
        vm.map_ram(0)
            .map_err(|(gpa, source)| Error::Call { what: format!("map RAM at {gpa:#x}"), source })?;
        Ok(Arc::new(vm))
    }

    /// The RAM of the guest.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Connects an event counter to an interrupt line.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn connect_irq(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd.register_irqfd(event, gsi).map_err(Error::call(format!("connect interrupt line {gsi}")))
    }

    /// Size of a vCPU's XSAVE area on this host, bytes.
    pub(super) fn xsave_bytes(&self) -> usize {
        self.xsave_bytes
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Switches KVM's log of the guest's writes on or off for all RAM.
    pub(crate) fn log_dirty_pages(&self, on: bool) -> Result<(), memory::Error> {
        let (flags, what) = if on { (KVM_MEM_LOG_DIRTY_PAGES, "switch on") } else { (0, "switch off") };
        self.map_ram(flags).map_err(|(gpa, source)| memory::Error::DirtyLog { gpa, what, source })
    }

    fn map_ram(&self, flags: u32) -> Result<(), (u64, io::Error)> {
        for (slot, (range, region)) in
            self.ram.layout().ranges().iter().zip(self.ram.memory().iter()).enumerate()
        {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: range.gpa,
                memory_size: range.len,
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one whole mapping of `self.ram`, which outlives `self.fd`; the guest may do with
            // it what it wants.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(|error| (range.gpa, error.into()))?;
        }
        Ok(())
    }
}

/// Message-signalled interrupts into a VM.
pub struct Msi(pub Arc<Vm>);

impl MsiSender for Msi {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // KVM answers 0 if the guest has switched that interrupt off: no error.
        self.0.fd.signal_msi(message).map(|_| ()).map_err(io::Error::from)
    }
}

/// Doorbell addresses of a VM, as ioeventfds.
pub struct IoEvents(pub Arc<Vm>);

impl Doorbells for IoEvents {
    fn connect(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0.fd.register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io::Error::from)
    }

    fn disconnect(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0
            .fd
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }
}

/// An interrupt line of a VM whose level is set by hand.
pub struct IrqLine {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Number of the line.
    pub gsi: u32,
}

impl InterruptLine for IrqLine {
    fn set(&self, high: bool) -> io::Result<()> {
        self.vm.fd.set_irq_line(self.gsi, high).map_err(io::Error::from)
    }
}
