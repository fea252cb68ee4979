//! One machine: RAM, vCPUs and devices put together, started from a kernel or from a saved state.
//!
//! What lives here: building in the right order, pausing and resuming all of it, its saved state, its end. What never
//! enters: migration, sockets, which host or datastore anything is on.

mod bus;
mod config;
mod exit;
mod prepared;
mod save;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vmm_sys_util::eventfd::EventFd;
use vmove_devices::net::AttachError;
use vmove_devices::state::{Section, StateError};
use vmove_devices::{ConsoleSink, DeviceError, DiskHandle, NetHandle};

pub use crate::kvm::ExitReason;
pub use config::{DiskConfig, DiskSource, MachineConfig, NetConfig};
pub use prepared::PreparedMachine;

use crate::boot::{self, BootSource};
use crate::kvm::{self, Hypervisor, RunState, Vcpu, Vm};
use crate::memory::{self, DirtyLog, GuestRam};
use bus::MachineBus;
use exit::Exit;
pub use exit::ExitWatch;

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for something that cannot be.
    #[error("machine configuration: {0}")]
    Config(String),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel and what it is given.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A network interface has nothing to be attached to.
    #[error("network {name}: {source}")]
    Attach {
        /// The interface's name in the machine.
        name: String,
        /// Why not.
        source: AttachError,
    },
    /// The sections of a saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// A saved state of another machine than the one configured.
    #[error("the saved state is that of another machine: {what} {saved} there, {here} here")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// Its value in the state.
        saved: u64,
        /// Its value in the configuration.
        here: u64,
    },
    /// Something that is only possible with the machine paused, or only before its end.
    #[error("cannot {what}: the machine {why}")]
    NotNow {
        /// What was tried.
        what: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// An event counter could not be made.
    #[error("cannot create an event: {0}")]
    Event(std::io::Error),
}

/// A machine. It is created paused; [`resume`](Self::resume) lets it run. Dropping it ends all its threads, flushing and
/// closing the disks nobody else holds.
pub struct Machine {
    // In this order at the end: vCPUs, then devices, then the VM with its RAM.
    vcpus: Vec<Vcpu>,
    devices: Arc<MachineBus>,
    disks: Vec<DiskHandle>,
    nics: Vec<NetHandle>,
    dirty: DirtyLog,
    vm: Arc<Vm>,
    exit: Arc<Exit>,
    /// Whether the devices are paused. Held while pausing and resuming, so that these come one after the other.
    devices_paused: Mutex<bool>,
}

impl Machine {
    /// A machine that will start its kernel with the first [`resume`](Self::resume).
    ///
    /// # Errors
    /// Names the part that cannot be had: KVM, RAM, a kernel file, an image, an impossible configuration.
    pub fn boot(config: MachineConfig, console: ConsoleSink) -> Result<Self, Error> {
        let hypervisor = Hypervisor::open()?;
        config.check(&hypervisor)?;
        let ram = GuestRam::new(config.memory_bytes)?;
        let kernel = config.kernel.as_deref().ok_or_else(|| Error::Config("no kernel to boot".to_owned()))?;
        let entry = boot::load(
            &ram,
            BootSource {
                kernel,
                initrd: config.initrd.as_deref(),
                cmdline: &config.cmdline,
                vcpus: config.vcpus,
            },
        )?;
        let prepared = PreparedMachine::new(hypervisor, config, ram, console)?;
        prepared.start(entry)
    }

    /// A machine that waits for a saved state, with everything made that can be made before it: what is left for
    /// [`PreparedMachine::restore`] is quick, since the guest stands still meanwhile. Kernel, initial RAM disk and
    /// command line of the configuration are not used. `ram` may be filled before, meanwhile, or afterwards.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), but for kernel files.
    pub fn prepare(
        config: MachineConfig,
        ram: GuestRam,
        console: ConsoleSink,
    ) -> Result<PreparedMachine, Error> {
        let hypervisor = Hypervisor::open()?;
        config.check(&hypervisor)?;
        if ram.layout().bytes() != config.memory_bytes {
            return Err(Error::Config(format!(
                "{} bytes of RAM were given for a machine of {}",
                ram.layout().bytes(),
                config.memory_bytes
            )));
        }
        PreparedMachine::new(hypervisor, config, ram, console)
    }

    /// [`prepare`](Self::prepare) and [`PreparedMachine::restore`] in one.
    ///
    /// # Errors
    /// As theirs.
    pub fn restore(
        config: MachineConfig,
        ram: GuestRam,
        sections: Vec<Section>,
        console: ConsoleSink,
    ) -> Result<Self, Error> {
        Self::prepare(config, ram, console)?.restore(sections)
    }

    /// Pauses vCPUs, then devices: when this returns the guest's state and RAM stand still, and every request the guest
    /// made is either done or not begun.
    ///
    /// # Errors
    /// [`Error::Device`] if a device's thread has died.
    pub fn pause(&self) -> Result<(), Error> {
        self.pause_vcpus();
        self.pause_devices()
    }

    /// The first half of [`pause`](Self::pause): no vCPU is in the guest and no access of theirs is half done. Devices
    /// go on with what they have.
    pub fn pause_vcpus(&self) {
        self.vcpus.iter().for_each(Vcpu::request_pause);
        self.vcpus.iter().for_each(Vcpu::wait_paused);
    }

    /// The second half of [`pause`](Self::pause): no request is in flight.
    ///
    /// # Errors
    /// [`Error::Device`] if a device's thread has died.
    pub fn pause_devices(&self) -> Result<(), Error> {
        let mut paused = self.lock();
        if !*paused {
            self.devices.pci.pause_all()?;
            *paused = true;
        }
        Ok(())
    }

    /// Lets devices and vCPUs run.
    ///
    /// # Errors
    /// [`Error::NotNow`] once the guest has ended, [`Error::Device`] if a device's thread has died.
    pub fn resume(&self) -> Result<(), Error> {
        if self.exit.reason().is_some() {
            return Err(Error::NotNow { what: "resume", why: "has ended" });
        }
        let mut paused = self.lock();
        if *paused {
            self.devices.pci.resume_all()?;
            *paused = false;
        }
        for vcpu in &self.vcpus {
            vcpu.resume()?;
        }
        Ok(())
    }

    /// The state of everything but RAM and disks, devices first. Saving may dirty RAM: collect once more afterwards.
    ///
    /// # Errors
    /// [`Error::NotNow`] unless paused; else what could not be read.
    pub fn save_state(&self) -> Result<Vec<Section>, Error> {
        let paused = self.lock();
        if !*paused || self.vcpus.iter().any(|vcpu| vcpu.state() == RunState::Running) {
            return Err(Error::NotNow { what: "save the state", why: "is not paused" });
        }
        if self.vcpus.iter().any(|vcpu| vcpu.state() == RunState::Stopped) {
            return Err(Error::NotNow { what: "save the state", why: "has ended" });
        }
        let mut sections = vec![save::machine_section(self)?];
        sections.extend(self.devices.pci.save()?);
        sections.push(self.devices.serial.save()?);
        sections.push(self.devices.power.save()?);
        for vcpu in &self.vcpus {
            sections.push(vcpu.save()?.encode()?);
        }
        // Last, so that the guest's clock is as late as it can be.
        sections.push(kvm::VmState::read(&self.vm)?.encode()?);
        Ok(sections)
    }

    /// The disk of that name.
    pub fn disk(&self, name: &str) -> Option<&DiskHandle> {
        self.disks.iter().find(|disk| disk.name() == name)
    }

    /// All disks, in the order the guest sees them.
    pub fn disks(&self) -> &[DiskHandle] {
        &self.disks
    }

    /// Tells the networks that the guest is here now ([`NetHandle::announce`]): for a guest that has come from elsewhere, just
    /// before it runs.
    ///
    /// # Errors
    /// [`Error::Device`] if a NIC's thread has died.
    pub fn announce(&self) -> Result<(), Error> {
        Ok(self.nics.iter().try_for_each(NetHandle::announce)?)
    }

    /// Lets go of the networks for good ([`NetHandle::leave`]): for a guest that runs elsewhere now.
    ///
    /// # Errors
    /// [`Error::Device`] if a NIC's thread has died.
    pub fn leave_networks(&self) -> Result<(), Error> {
        Ok(self.nics.iter().try_for_each(NetHandle::leave)?)
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// The dirty log of the guest's RAM.
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.dirty
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// Types into the guest's serial console. Returns how many bytes were taken; the rest had no room.
    pub fn console_input(&self, input: &[u8]) -> usize {
        self.devices.serial.feed(input)
    }

    /// Presses the guest's power button. False, with nothing done, while the devices are paused or about to be: a press
    /// might come too late for a state that is saved.
    pub fn press_power_button(&self) -> bool {
        let paused = match self.devices_paused.try_lock() {
            Ok(paused) => paused,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        if !*paused {
            self.devices.power.press_button();
        }
        !*paused
    }

    /// Why the guest ended, if it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.exit.reason()
    }

    /// Waits until the guest ends. With several vCPUs the others may still run: [`pause`](Self::pause) or drop the
    /// machine then.
    pub fn wait_exit(&self) -> ExitReason {
        self.exit.wait()
    }

    /// For a thread that waits for the guest's end and must not keep the machine alive.
    pub fn exit_watch(&self) -> ExitWatch {
        ExitWatch(Arc::clone(&self.exit))
    }

    /// Becomes readable when the guest ends; never read from here.
    pub fn exit_event(&self) -> &EventFd {
        self.exit.event()
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.devices_paused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
