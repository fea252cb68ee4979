//! Help where KVM's instruction emulator gives up: a handful of ring-0 instructions that a kernel needs to boot on
//! hosts whose KVM emulates all of ring 0 (no VT-x or AMD-V), and that no hardware KVM ever hands over.
//!
//! What never enters: a general emulator. An instruction that is not here ends the guest with an error that names it.

use kvm_ioctls::VcpuFd;

/// RFLAGS.AC, set by STAC and cleared by CLAC.
const ALIGNMENT_CHECK: u64 = 1 << 18;
/// Vector of #BP.
const BREAKPOINT: u8 = 3;

/// What an instruction does, as far as it is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// #BP is raised after the instruction.
    Breakpoint,
    /// Nothing but going on.
    Skip,
    /// RFLAGS.AC becomes this.
    AlignmentCheck(bool),
}

/// The effect and the length of the instruction at the start of `bytes`, by its opcode (Intel SDM vol. 2).
fn decode(bytes: &[u8]) -> Option<(Effect, u64)> {
    match bytes {
        [0xcc, ..] => Some((Effect::Breakpoint, 1)),
        // FWAIT: no x87 exception is pending in a kernel that uses no x87.
        [0x9b, ..] => Some((Effect::Skip, 1)),
        [0x0f, 0x01, 0xca, ..] => Some((Effect::AlignmentCheck(false), 3)),
        [0x0f, 0x01, 0xcb, ..] => Some((Effect::AlignmentCheck(true), 3)),
        _ => None,
    }
}

/// Does what the instruction at RIP does, if it is one of the few known here.
///
/// # Errors
/// What KVM said to a read or write of the vCPU's registers.
pub(super) fn assist(vcpu: &VcpuFd, bytes: &[u8]) -> Result<bool, kvm_ioctls::Error> {
    let Some((effect, length)) = decode(bytes) else { return Ok(false) };
    let mut regs = vcpu.get_regs()?;
    regs.rip = regs.rip.wrapping_add(length);
    match effect {
        Effect::AlignmentCheck(true) => regs.rflags |= ALIGNMENT_CHECK,
        Effect::AlignmentCheck(false) => regs.rflags &= !ALIGNMENT_CHECK,
        Effect::Skip | Effect::Breakpoint => {}
    }
    vcpu.set_regs(&regs)?;
    if effect == Effect::Breakpoint {
        let mut events = vcpu.get_vcpu_events()?;
        events.exception.injected = 1;
        events.exception.nr = BREAKPOINT;
        events.exception.has_error_code = 0;
        vcpu.set_vcpu_events(&events)?;
    }
    tracing::trace!(rip = regs.rip, ?effect, "emulated an instruction that KVM does not");
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instructions_and_nothing_else() {
        assert_eq!(decode(&[0xcc, 0x90]), Some((Effect::Breakpoint, 1)));
        assert_eq!(decode(&[0x9b]), Some((Effect::Skip, 1)));
        assert_eq!(decode(&[0x0f, 0x01, 0xcb, 0xc3]), Some((Effect::AlignmentCheck(true), 3)));
        assert_eq!(decode(&[0x0f, 0x01, 0xca]), Some((Effect::AlignmentCheck(false), 3)));
        assert_eq!(decode(&[0x0f, 0x01]), None);
        assert_eq!(decode(&[]), None);
    }
}
