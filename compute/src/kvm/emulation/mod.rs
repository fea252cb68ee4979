//! Help where KVM's instruction emulator gives up: the few ring-0 instructions that a kernel needs on hosts whose KVM
//! emulates all of ring 0 (no VT-x or AMD-V), and that no hardware KVM ever hands over.
//!
//! What lives here: finding the instruction, carrying it out, putting the result into the vCPU. What never enters: a
//! general emulator. An instruction that is not here ends the guest with an error that names it.

mod execute;
mod linear;
mod xstate;

use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction, Mnemonic};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{Vm, xsave};
use linear::Linear;
use xstate::XState;

/// Longest instruction (Intel SDM vol. 2, 2.3.11).
const MAX_BYTES: usize = 15;
/// Vector of a page fault, whose address is in CR2.
const PAGE_FAULT: u8 = 14;

/// An exception that an instruction raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Exception {
    vector: u8,
    /// Error code, where the exception has one.
    code: Option<u32>,
    /// Where a page fault happened.
    address: u64,
}

/// Why an instruction was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stop {
    /// It raises an exception instead.
    Raise(Exception),
    /// It is not known here, or in a situation that is not.
    Unknown(&'static str),
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Raise(exception)
    }
}

/// The registers that an instruction works on.
struct Cpu {
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// An unmasked x87 exception waits to be raised.
    x87_pending: bool,
}

/// What became of an instruction that KVM gave up at.
pub(super) enum Assist {
    /// It was carried out, or raised its exception.
    Done,
    /// It cannot be; the text names it.
    Refused(String),
}

/// Carries out the instruction at RIP, whose bytes KVM gave as far as it has them.
///
/// # Errors
/// What KVM said to a read or write of the vCPU's registers.
pub(super) fn assist(vcpu: &VcpuFd, vm: &Vm, given: &[u8]) -> Result<Assist, kvm_ioctls::Error> {
    let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    let memory = Linear::new(vm.ram(), &sregs);
    let code = if given.is_empty() {
        memory.fetch(sregs.cs.base.wrapping_add(regs.rip), MAX_BYTES)
    } else {
        given.to_vec()
    };
    let instruction = decode(&code, regs.rip, &sregs);
    let mut cpu = Cpu { regs, sregs, x87_pending: false };
    // Ring 3 runs natively wherever ring 0 does not; what KVM emulates of it is access to devices.
    let outcome = if sregs.ss.dpl != 0 {
        Err(Stop::Unknown("not in ring 0"))
    } else if let Some(kind) = xstate::kind(instruction.mnemonic()) {
        let before = xsave::read(vcpu, vm.xsave_bytes())?;
        let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
        let mut state = XState::new(before.clone(), cpuid.as_slice(), vcpu.get_xcrs()?.xcrs[0].value);
        let outcome = state.run(kind, &instruction, &mut cpu, &memory);
        if state.bytes() != before {
            xsave::write(vcpu, vm.xsave_bytes(), state.bytes())?;
        }
        outcome
    } else {
        if instruction.mnemonic() == Mnemonic::Wait {
            // Summary bit of the status word (Intel SDM vol. 1, 8.1.3.3).
            cpu.x87_pending = vcpu.get_fpu()?.fsw & 1 << 7 != 0;
        }
        execute::run(&instruction, &mut cpu, &memory)
    };
    match outcome {
        Ok(()) => {
            cpu.regs.rip = instruction.next_ip();
            vcpu.set_regs(&cpu.regs)?;
        }
        Err(Stop::Raise(exception)) => {
            if exception.vector == execute::BREAKPOINT {
                // A trap: it is raised behind the instruction.
                cpu.regs.rip = instruction.next_ip();
                vcpu.set_regs(&cpu.regs)?;
            }
            raise(vcpu, &mut cpu, exception)?;
        }
        Err(Stop::Unknown(why)) => return Ok(Assist::Refused(name(&instruction, &code, why))),
    }
    tracing::trace!(rip = regs.rip, mnemonic = ?instruction.mnemonic(), "an instruction that KVM does not emulate");
    Ok(Assist::Done)
}

/// The instruction at the start of `code`, in the mode that the code segment says.
fn decode(code: &[u8], rip: u64, sregs: &kvm_sregs) -> Instruction {
    let bits = match (sregs.cs.l, sregs.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    };
    Decoder::with_ip(bits, code, rip, DecoderOptions::NONE).decode()
}

/// An instruction in words and bytes, and why it is not carried out.
fn name(instruction: &Instruction, code: &[u8], why: &str) -> String {
    let mut text = String::new();
    if instruction.is_invalid() {
        text.push_str("(no instruction)");
    } else {
        FastFormatter::new().format(instruction, &mut text);
    }
    let length = if instruction.is_invalid() { code.len() } else { instruction.len() };
    let bytes: Vec<_> = code.iter().take(length).map(|byte| format!("{byte:02x}")).collect();
    format!("{text} ({}): {why}", bytes.join(" "))
}

fn raise(vcpu: &VcpuFd, cpu: &mut Cpu, exception: Exception) -> Result<(), kvm_ioctls::Error> {
    if exception.vector == PAGE_FAULT {
        cpu.sregs.cr2 = exception.address;
        vcpu.set_sregs(&cpu.sregs)?;
    }
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = exception.vector;
    events.exception.has_error_code = u8::from(exception.code.is_some());
    events.exception.error_code = exception.code.unwrap_or(0);
    vcpu.set_vcpu_events(&events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_named() {
        let mut sregs = kvm_sregs::default();
        sregs.cs.l = 1;
        let code = [0xf3, 0x0f, 0x58, 0xc1, 0x90, 0x90];
        let instruction = decode(&code, 0x1000, &sregs);
        assert_eq!(
            name(&instruction, &code, "it is not known here"),
            "addss xmm0,xmm1 (f3 0f 58 c1): it is not known here"
        );
        let code = [0x06];
        assert!(name(&decode(&code, 0, &sregs), &code, "why").starts_with("(no instruction) (06)"));
    }

    #[test]
    fn the_code_segment_says_how_to_read_it() {
        let mut sregs = kvm_sregs::default();
        let code = [0x48, 0x0f, 0x01, 0xca];
        assert_eq!(decode(&code, 0, &sregs).mnemonic(), Mnemonic::Dec, "16 bits");
        sregs.cs.l = 1;
        let instruction = decode(&code, 0, &sregs);
        assert_eq!((instruction.mnemonic(), instruction.len()), (Mnemonic::Clac, 4));
    }
}
