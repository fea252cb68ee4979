//! A machine before its guest: RAM mapped, vCPUs and devices made, disks open, no state in any of them.
//!
//! What never enters: anything after the machine is whole.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;
use vmove_devices::net::Tap;
use vmove_devices::state::{Section, Sections};
use vmove_devices::{Block, ConsoleSink, DiskHandle, Net, NetHandle, PciBus, Power, Rng, Serial};

use super::bus::MachineBus;
use super::exit::Exit;
use super::{DiskConfig, DiskSource, Error, Machine, MachineConfig, NetConfig, save};
use crate::boot::Entry;
use crate::kvm::{Bus, ExitListener, Hypervisor, IoEvents, IrqLine, Msi, NewVcpus, Vcpu, Vm};
use crate::memory::{DirtyLog, GuestRam};

/// A machine that waits for its state. Made by [`Machine::prepare`].
pub struct PreparedMachine {
    // In this order at the end: devices before the VM with its RAM.
    vcpus: NewVcpus,
    devices: Arc<MachineBus>,
    disks: Vec<DiskHandle>,
    nics: Vec<NetHandle>,
    vm: Arc<Vm>,
    exit: Arc<Exit>,
    config: MachineConfig,
}

impl PreparedMachine {
    /// All that can be made without a state. The devices are paused.
    pub(super) fn new(
        hypervisor: Hypervisor,
        config: MachineConfig,
        ram: GuestRam,
        console: ConsoleSink,
    ) -> Result<Self, Error> {
        let vm = Vm::new(&hypervisor, ram)?;
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::Event)?;
        vm.connect_irq(&line, Serial::IRQ)?;
        let mut pci = PciBus::new(Arc::new(IoEvents(Arc::clone(&vm))), Arc::new(Msi(Arc::clone(&vm))));
        let mut disks = Vec::new();
        for DiskConfig { name, source } in &config.disks {
            let disk = match source {
                DiskSource::Image { path, options } => DiskHandle::open(name, path, options.clone())?,
                DiskSource::Open(disk) => disk.clone(),
            };
            let device = Block::new(Arc::clone(vm.ram().memory()), disk.clone(), name);
            pci.add_virtio(&format!("disk-{name}"), Box::new(device))?;
            disks.push(disk);
        }
        let mut nics = Vec::new();
        for NetConfig { name, mac, attachment, owner } in &config.networks {
            let tap = Tap::attach(attachment, owner, *mac)
                .map_err(|source| Error::Attach { name: name.clone(), source })?;
            tracing::info!(network = name, tap = tap.name(), %attachment, %mac, "attached");
            let nic = NetHandle::open(name, *mac, Box::new(tap))?;
            let device = Net::new(Arc::clone(vm.ram().memory()), nic.clone());
            pci.add_virtio(&format!("net-{name}"), Box::new(device))?;
            nics.push(nic);
        }
        pci.add_virtio("entropy", Box::new(Rng::new(Arc::clone(vm.ram().memory()))?))?;
        pci.pause_all()?;
        let vcpus = NewVcpus::new(hypervisor, Arc::clone(&vm), config.vcpus)?;
        let power = Power::new(Arc::new(IrqLine { vm: Arc::clone(&vm), gsi: Power::IRQ }));
        let devices = Arc::new(MachineBus { pci, serial: Serial::new(line, console), power });
        Ok(Self { vcpus, devices, disks, nics, vm, exit: Arc::new(Exit::new()?), config })
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// All disks, in the order the guest sees them.
    pub fn disks(&self) -> &[DiskHandle] {
        &self.disks
    }

    /// Puts a saved state into the machine, whose RAM is complete. It is paused, and nothing of the guest runs before
    /// [`Machine::resume`]. RAM is not written to. The guest's clocks go forward by the time since the state was saved, by
    /// the two hosts' clocks.
    ///
    /// The sections are untrusted: any nonsense in them is an error here, or at worst the guest's own trouble.
    ///
    /// # Errors
    /// What is wrong with the state: sections missing, unknown or left over, another configuration, CPU features that
    /// this host lacks, values that KVM or a device refuses.
    pub fn restore(self, sections: Vec<Section>) -> Result<Machine, Error> {
        let mut sections = Sections::new(sections)?;
        save::check_machine(&self.config, &mut sections)?;
        // KVM before the devices: a device may deliver an interrupt as soon as it has its state.
        let (bus, listener) = (self.bus(), self.listener());
        let vcpus = self.vcpus.restore(&mut sections, &bus, &listener)?;
        self.devices.pci.restore(&mut sections)?;
        self.devices.serial.restore(&mut sections)?;
        self.devices.power.restore(&mut sections)?;
        sections.finish()?;
        Ok(machine(vcpus, self.devices, self.disks, self.nics, self.vm, self.exit))
    }

    /// Sets the first vCPU to the kernel's first instruction.
    pub(super) fn start(self, entry: Entry) -> Result<Machine, Error> {
        let (bus, listener) = (self.bus(), self.listener());
        let vcpus = self.vcpus.start(|regs, sregs| entry.set_registers(regs, sregs), &bus, &listener)?;
        Ok(machine(vcpus, self.devices, self.disks, self.nics, self.vm, self.exit))
    }

    fn bus(&self) -> Arc<dyn Bus> {
        Arc::clone(&self.devices) as Arc<dyn Bus>
    }

    fn listener(&self) -> Arc<dyn ExitListener> {
        Arc::clone(&self.exit) as Arc<dyn ExitListener>
    }
}

/// The parts of a machine with its devices paused, as a whole.
fn machine(
    vcpus: Vec<Vcpu>,
    devices: Arc<MachineBus>,
    disks: Vec<DiskHandle>,
    nics: Vec<NetHandle>,
    vm: Arc<Vm>,
    exit: Arc<Exit>,
) -> Machine {
    Machine {
        vcpus,
        devices,
        disks,
        nics,
        dirty: DirtyLog::new(Arc::clone(&vm)),
        vm,
        exit,
        devices_paused: Mutex::new(true),
    }
}
