//! vCPU threads: one thread a vCPU, paused and resumed from outside, its exits handed to a [`Bus`].
//!
//! What never enters: what a port or an address means, saved state beyond passing the call on.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::emulation::{self, Assist};
use super::{Bus, Error, ExitListener, ExitReason, VcpuState, Vm};

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Not in the guest; it can be resumed and its state can be read.
    Paused,
    /// In the guest, or on its way.
    Running,
    /// Ended by the guest or by an error; it never runs again.
    Stopped,
}

/// One vCPU and its thread. It starts paused; dropping it ends the thread.
pub struct Vcpu {
    id: u8,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    /// The thread hands its fd back when it ends, so that `shared.run` stays mapped until after the join.
    thread: Option<JoinHandle<VcpuFd>>,
}

enum Command {
    Resume,
    Save(SyncSender<Result<VcpuState, Error>>),
}

struct Shared {
    /// Set before the kick, read by the thread after it has cleared `immediate_exit`: one of the two is always seen.
    pause: AtomicBool,
    state: Mutex<RunState>,
    changed: Condvar,
    run: RunPage,
}

/// The `kvm_run` page of a vCPU, for the one field that other threads write.
struct RunPage(*mut kvm_run);

// SAFETY: the only access is an atomic one to `immediate_exit`, which the KVM API makes for this use; the page stays
// mapped as long as a `Vcpu` exists (see its field `thread`), and only a `Vcpu` or its own thread use it.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the page is mapped (see above), the field is a byte, and every access to it here is atomic.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) };
        flag.store(value, Ordering::SeqCst);
    }

    /// Size of one unit of the I/O access that just made the vCPU exit. Only for the vCPU's own thread, after an
    /// exit for port I/O.
    fn io_size(&self) -> usize {
        // SAFETY: the page is mapped, its owner is not in the kernel, and KVM filled in this union field.
        usize::from(unsafe { (*self.0).__bindgen_anon_1.io.size })
    }
}

/// The signal that gets a vCPU's thread out of KVM.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives the kick signal a handler, once a process: a signal that is ignored would not interrupt KVM.
fn install_kick() -> Result<(), Error> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|error| error.errno()))
        .map_err(|errno| Error::Call {
            what: "install the handler of the vCPU signal".to_owned(),
            source: io::Error::from_raw_os_error(errno),
        })
}

impl Vcpu {
    /// Starts the thread of a vCPU whose registers are set up. It waits for [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Error::Call`] if the thread cannot be made.
    pub(super) fn spawn(
        id: u8,
        mut fd: VcpuFd,
        vm: Arc<Vm>,
        msrs: Arc<[u32]>,
        bus: Arc<dyn Bus>,
        listener: Arc<dyn ExitListener>,
    ) -> Result<Self, Error> {
        install_kick()?;
        let shared = Arc::new(Shared {
            pause: AtomicBool::new(false),
            state: Mutex::new(RunState::Paused),
            changed: Condvar::new(),
            run: RunPage(fd.get_kvm_run()),
        });
        let (commands, inbox) = channel();
        let worker = Worker { id, fd, vm, msrs, bus, listener, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || worker.serve(&inbox))
            .map_err(|source| Error::Call { what: format!("start the thread of vCPU {id}"), source })?;
        Ok(Self { id, shared, commands, thread: Some(thread) })
    }

    /// Number of the vCPU, which is also its APIC id.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Where it is now.
    pub fn state(&self) -> RunState {
        *self.shared.lock()
    }

    /// Lets it run; nothing happens if it does already.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if it has stopped.
    pub fn resume(&self) -> Result<(), Error> {
        let mut state = self.shared.lock();
        match *state {
            RunState::Running => return Ok(()),
            RunState::Stopped => return Err(self.refuse("cannot be resumed, it has stopped")),
            RunState::Paused => {}
        }
        // Here and not in the thread: a pause that follows at once must not be overwritten.
        self.shared.pause.store(false, Ordering::SeqCst);
        self.commands.send(Command::Resume).map_err(|_| self.refuse("has lost its thread"))?;
        *state = RunState::Running;
        Ok(())
    }

    /// Asks it to pause, without waiting, so that many can be asked before the first is waited for.
    pub fn request_pause(&self) {
        self.shared.pause.store(true, Ordering::SeqCst);
        self.shared.run.set_immediate_exit(1);
        if let Some(thread) = &self.thread {
            // The flag alone stops the next entry; the signal is for a vCPU that is in the guest. A thread that has
            // ended needs neither.
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::debug!(vcpu = self.id, %error, "kick");
            }
        }
    }

    /// Waits until it is out of the guest, after [`request_pause`](Self::request_pause). Its pending I/O is done.
    pub fn wait_paused(&self) {
        let mut state = self.shared.lock();
        while *state == RunState::Running {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reads its state. It must be paused.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if it is not paused, [`Error::Call`] if KVM fails.
    pub fn save(&self) -> Result<VcpuState, Error> {
        if self.state() != RunState::Paused {
            return Err(self.refuse("cannot be saved, it is not paused"));
        }
        let (reply, answer) = sync_channel(1);
        self.commands.send(Command::Save(reply)).map_err(|_| self.refuse("has lost its thread"))?;
        answer.recv().map_err(|_| self.refuse("has lost its thread"))?
    }

    fn refuse(&self, what: &str) -> Error {
        Error::Vcpu { id: self.id, what: what.to_owned() }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.request_pause();
        // The thread ends when its inbox is closed.
        self.commands = channel().0;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.id, "the thread panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, to: RunState) {
        *self.lock() = to;
        self.changed.notify_all();
    }
}

/// What the thread of a vCPU owns.
struct Worker {
    id: u8,
    fd: VcpuFd,
    vm: Arc<Vm>,
    msrs: Arc<[u32]>,
    bus: Arc<dyn Bus>,
    listener: Arc<dyn ExitListener>,
    shared: Arc<Shared>,
}

/// Sets the state when the thread ends in any way, so that nobody waits for a thread that panicked.
struct StopOnDrop(Arc<Shared>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.set(RunState::Stopped);
    }
}

impl Worker {
    fn serve(mut self, inbox: &Receiver<Command>) -> VcpuFd {
        let _stop = StopOnDrop(Arc::clone(&self.shared));
        if let Err(error) = unblock_signal(kick_signal()) {
            tracing::warn!(vcpu = self.id, ?error, "cannot unblock the kick signal");
        }
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Save(reply) => {
                    let _ = reply.send(VcpuState::read(self.id, &self.fd, &self.vm, &self.msrs));
                }
                Command::Resume => match self.run() {
                    None => self.shared.set(RunState::Paused),
                    Some(reason) => {
                        self.shared.set(RunState::Stopped);
                        self.listener.ended(self.id, reason);
                        break;
                    }
                },
            }
        }
        self.fd
    }

    /// Runs the guest until a pause is asked for (`None`) or the guest ends.
    fn run(&mut self) -> Option<ExitReason> {
        // Tells the guest's kvmclock that it was stopped, so that its watchdogs keep quiet. A guest without kvmclock
        // gives EINVAL.
        let _ = self.fd.kvmclock_ctrl();
        self.shared.run.set_immediate_exit(0);
        while !self.shared.pause.load(Ordering::SeqCst) {
            match self.enter() {
                Entry::Handled | Entry::Interrupted => {}
                Entry::Ended(reason) => return Some(reason),
            }
        }
        self.settle()
    }

    /// Completes an I/O that the guest is in the middle of. KVM applies the result of an access only at the next entry;
    /// without this the access would be done twice after a restore, or its result lost.
    fn settle(&mut self) -> Option<ExitReason> {
        self.shared.run.set_immediate_exit(1);
        loop {
            match self.enter() {
                Entry::Interrupted => return None,
                Entry::Handled => {}
                Entry::Ended(reason) => return Some(reason),
            }
        }
    }

    fn enter(&mut self) -> Entry {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    // EAGAIN: a vCPU that waits for its start-up message was woken.
                    libc::EINTR | libc::EAGAIN => Entry::Interrupted,
                    _ => {
                        let rip = self.rip();
                        self.ended(format!("KVM_RUN failed: {error} ({rip})"))
                    }
                };
            }
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                // A string instruction gives many accesses to the same port in one exit.
                for access in data.chunks(self.shared.run.io_size().max(1)) {
                    if let Some(reason) = self.bus.io_write(port, access) {
                        return Entry::Ended(reason);
                    }
                }
            }
            VcpuExit::IoIn(port, data) => {
                for access in data.chunks_mut(self.shared.run.io_size().max(1)) {
                    self.bus.io_read(port, access);
                }
            }
            VcpuExit::MmioRead(address, data) => self.bus.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => self.bus.mmio_write(address, data),
            VcpuExit::Intr => return Entry::Interrupted,
            VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_) => {}
            VcpuExit::Shutdown => {
                tracing::warn!(vcpu = self.id, at = self.rip(), "a triple fault resets the guest");
                return Entry::Ended(ExitReason::Reset);
            }
            VcpuExit::FailEntry(reason, cpu) => {
                let rip = self.rip();
                return self
                    .ended(format!("the CPU refused entry on host CPU {cpu}, reason {reason:#x} ({rip})"));
            }
            VcpuExit::InternalError => return self.internal_error(),
            VcpuExit::MemoryFault { gpa, size, .. } => {
                let rip = self.rip();
                return self.ended(format!("the host cannot give {size} bytes of RAM at {gpa:#x} ({rip})"));
            }
            other => {
                let what = format!("unexpected exit {other:?}");
                let rip = self.rip();
                return self.ended(format!("{what} ({rip})"));
            }
        }
        Entry::Handled
    }

    /// An internal error of KVM: helped out if it is one of the few instructions known here, else the end.
    fn internal_error(&mut self) -> Entry {
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM filled in `internal` before this exit, and `emulation_failure` begins with the same fields.
        let (suberror, failure) =
            unsafe { (run.__bindgen_anon_1.internal.suberror, run.__bindgen_anon_1.emulation_failure) };
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            let rip = self.rip();
            return self.ended(format!("KVM internal error {suberror} ({rip})"));
        }
        let mut bytes = Vec::new();
        // ndata counts 64-bit words: flags, then size and bytes of the instruction (KVM API, KVM_EXIT_INTERNAL_ERROR).
        if failure.ndata >= 3 {
            // SAFETY: ndata says that KVM filled these in.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            if failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0 {
                let size = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
                bytes.extend_from_slice(&instruction.insn_bytes[..size]);
            }
        }
        match emulation::assist(&self.fd, &self.vm, &bytes) {
            Ok(Assist::Done) => Entry::Handled,
            Ok(Assist::Refused(what)) => {
                let rip = self.rip();
                self.ended(format!("KVM cannot emulate the instruction {what} ({rip})"))
            }
            Err(error) => self.ended(format!("cannot change registers after an emulation failure: {error}")),
        }
    }

    fn ended(&self, what: String) -> Entry {
        Entry::Ended(ExitReason::Error(format!("vCPU {}: {what}", self.id)))
    }

    fn rip(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => {
                format!("rip {:#x}, cs {:#x}, cr0 {:#x}", regs.rip, sregs.cs.selector, sregs.cr0)
            }
            _ => "rip unknown".to_owned(),
        }
    }
}

/// What one entry into the guest came to.
enum Entry {
    /// An exit was served.
    Handled,
    /// A signal or the immediate-exit flag.
    Interrupted,
    /// The guest is at its end.
    Ended(ExitReason),
}
