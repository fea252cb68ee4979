//! XSAVE, XRSTOR and their kin (Intel SDM vol. 1, chapter 13) on the FPU state that KVM gives in the standard format.
//!
//! What never enters: KVM, supervisor components (a guest that uses one is refused).

use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::kvm_cpuid_entry2;

use super::execute::address;
use super::linear::Linear;
use super::{Cpu, Exception, Stop};

const GENERAL_PROTECTION: Exception = Exception { vector: 13, code: Some(0), address: 0 };

/// Bits of XCR0 and XSTATE_BV.
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

/// Parts of the legacy area (13.4.1): x87 state on both sides of MXCSR, XMM registers.
const MXCSR: std::ops::Range<usize> = 24..32;
const X87_LOW: std::ops::Range<usize> = 0..24;
const X87_HIGH: std::ops::Range<usize> = 32..160;
const XMM: std::ops::Range<usize> = 160..416;
const XSTATE_BV: std::ops::Range<usize> = 512..520;
const XCOMP_BV: std::ops::Range<usize> = 520..528;
const HEADER: std::ops::Range<usize> = 512..576;
/// Where extended components begin in a compacted area.
const EXTENDED: usize = 576;
/// MXCSR after reset, and the bits that may be set on every CPU with XSAVE.
const MXCSR_INIT: u32 = 0x1f80;
const MXCSR_ALLOWED: u32 = 0xffff;

/// What one of the instructions does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// XSAVE, XSAVEOPT.
    Save,
    /// XSAVEC, XSAVES.
    SaveCompacted,
    /// XRSTOR, XRSTORS.
    Restore,
}

/// What an instruction of that name does, if it is one of them.
pub(super) fn kind(mnemonic: Mnemonic) -> Option<Kind> {
    match mnemonic {
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Some(Kind::Save),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xsaves | Mnemonic::Xsaves64 => {
            Some(Kind::SaveCompacted)
        }
        Mnemonic::Xrstor | Mnemonic::Xrstor64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
            Some(Kind::Restore)
        }
        _ => None,
    }
}

/// An extended component, from CPUID leaf 0xd.
#[derive(Clone, Copy, Debug)]
struct Component {
    number: u32,
    offset: usize,
    bytes: usize,
    /// In a compacted area it begins at a multiple of 64 bytes.
    aligned: bool,
}

/// The FPU state of a vCPU.
pub(super) struct XState {
    area: Vec<u8>,
    components: Vec<Component>,
    xcr0: u64,
}

impl XState {
    /// `area` is in the standard format.
    pub(super) fn new(area: Vec<u8>, cpuid: &[kvm_cpuid_entry2], xcr0: u64) -> Self {
        let mut components: Vec<_> = cpuid
            .iter()
            .filter(|leaf| leaf.function == 0xd && (2..63).contains(&leaf.index) && leaf.ecx & 1 == 0)
            .map(|leaf| Component {
                number: leaf.index,
                offset: leaf.ebx as usize,
                bytes: leaf.eax as usize,
                aligned: leaf.ecx & 2 != 0,
            })
            .filter(|component| component.bytes > 0 && component.offset + component.bytes <= area.len())
            .collect();
        components.sort_by_key(|component| component.number);
        Self { area, components, xcr0 }
    }

    /// The state in the standard format.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.area
    }

    /// Carries out an instruction of that kind.
    pub(super) fn run(
        &mut self,
        kind: Kind,
        instruction: &Instruction,
        cpu: &mut Cpu,
        memory: &Linear<'_>,
    ) -> Result<(), Stop> {
        // CR4.OSXSAVE and CR0.TS.
        if cpu.sregs.cr4 & 1 << 18 == 0 {
            return Err(Exception { vector: 6, code: None, address: 0 }.into());
        }
        if cpu.sregs.cr0 & 1 << 3 != 0 {
            return Err(Exception { vector: 7, code: None, address: 0 }.into());
        }
        let at = address(instruction, 0, cpu)?;
        if !at.is_multiple_of(64) {
            return Err(GENERAL_PROTECTION.into());
        }
        let asked = (cpu.regs.rdx << 32 | cpu.regs.rax & 0xffff_ffff) & self.xcr0;
        let known = self.components.iter().fold(X87 | SSE, |bits, component| bits | 1 << component.number);
        if asked & !known != 0 {
            return Err(Stop::Unknown("it is about an FPU component not known here"));
        }
        match kind {
            Kind::Save => self.save(at, asked, memory),
            Kind::SaveCompacted => self.save_compacted(at, asked, memory),
            Kind::Restore => self.restore(at, asked, memory),
        }
    }

    fn save(&self, at: u64, asked: u64, memory: &Linear<'_>) -> Result<(), Stop> {
        let mut header = [0; 8];
        memory.read(at + XSTATE_BV.start as u64, &mut header)?;
        let in_use = u64::from_le_bytes(header) & !asked | self.in_use() & asked;
        // The header last: every page was found writable by then.
        let mut parts = Vec::new();
        if asked & X87 != 0 {
            parts.extend([X87_LOW, X87_HIGH]);
        }
        if asked & (SSE | AVX) != 0 {
            parts.push(MXCSR);
        }
        if asked & SSE != 0 {
            parts.push(XMM);
        }
        parts.extend(self.among(asked).map(|component| component.offset..component.offset + component.bytes));
        for part in parts {
            memory.write(at + part.start as u64, &self.area[part])?;
        }
        memory.write(at + XSTATE_BV.start as u64, &in_use.to_le_bytes())
    }

    fn save_compacted(&self, at: u64, asked: u64, memory: &Linear<'_>) -> Result<(), Stop> {
        let saved = self.in_use() & asked;
        if saved & X87 != 0 {
            memory.write(at + X87_LOW.start as u64, &self.area[X87_LOW])?;
            memory.write(at + X87_HIGH.start as u64, &self.area[X87_HIGH])?;
        }
        if saved & SSE != 0 {
            memory.write(at + MXCSR.start as u64, &self.area[MXCSR])?;
            memory.write(at + XMM.start as u64, &self.area[XMM])?;
        }
        for (component, offset) in self.compacted(asked) {
            if saved & 1 << component.number != 0 {
                let there = component.offset..component.offset + component.bytes;
                memory.write(at + offset as u64, &self.area[there])?;
            }
        }
        let mut header = [0; 64];
        header[..8].copy_from_slice(&saved.to_le_bytes());
        header[8..16].copy_from_slice(&(asked | COMPACTED).to_le_bytes());
        memory.write(at + HEADER.start as u64, &header)
    }

    fn restore(&mut self, at: u64, asked: u64, memory: &Linear<'_>) -> Result<(), Stop> {
        let mut head = [0; EXTENDED];
        memory.read(at, &mut head)?;
        let word = |range: std::ops::Range<usize>| {
            head[range].iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
        };
        let (in_use, compacted_bv) = (word(XSTATE_BV), word(XCOMP_BV));
        let compacted = compacted_bv & COMPACTED != 0;
        let allowed = if compacted { compacted_bv & !COMPACTED } else { self.xcr0 };
        let reserved = if compacted { XCOMP_BV.end..HEADER.end } else { XCOMP_BV.start..HEADER.end };
        if in_use & !allowed != 0 || allowed & !self.xcr0 != 0 || head[reserved].iter().any(|byte| *byte != 0)
        {
            return Err(GENERAL_PROTECTION.into());
        }
        let mut area = self.area.clone();
        let mut mxcsr = None;
        if asked & SSE != 0 || asked & AVX != 0 && !compacted {
            // In the standard format it is loaded even if the registers are not.
            let loaded = !compacted || in_use & SSE != 0;
            mxcsr = Some(if loaded { word(24..28) as u32 } else { MXCSR_INIT });
        }
        if mxcsr.is_some_and(|value| value & !MXCSR_ALLOWED != 0) {
            return Err(GENERAL_PROTECTION.into());
        }
        if asked & in_use & X87 != 0 {
            area[X87_LOW].copy_from_slice(&head[X87_LOW]);
            area[X87_HIGH].copy_from_slice(&head[X87_HIGH]);
        }
        if asked & in_use & SSE != 0 {
            area[XMM].copy_from_slice(&head[XMM]);
        }
        if let Some(value) = mxcsr {
            area[24..28].copy_from_slice(&value.to_le_bytes());
        }
        let placed: Vec<_> = if compacted {
            self.compacted(allowed).collect()
        } else {
            self.among(self.xcr0).map(|component| (component, component.offset)).collect()
        };
        for (component, offset) in placed {
            if asked & in_use & 1 << component.number != 0 {
                let there = component.offset..component.offset + component.bytes;
                memory.read(at + offset as u64, &mut area[there])?;
            }
        }
        // What is asked for and not in use gets its first value: KVM gives it to whatever this does not name.
        let mut now = self.in_use() & !asked | in_use & asked;
        if mxcsr.is_some_and(|value| value != MXCSR_INIT) && now & SSE == 0 {
            // KVM takes MXCSR along with the registers.
            area[XMM].fill(0);
            now |= SSE;
        }
        area[XSTATE_BV].copy_from_slice(&now.to_le_bytes());
        self.area = area;
        Ok(())
    }

    /// Components whose state is not that after reset, as far as KVM says.
    fn in_use(&self) -> u64 {
        let bytes = &self.area[XSTATE_BV];
        bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)) & self.xcr0
    }

    fn among(&self, bits: u64) -> impl Iterator<Item = Component> {
        self.components.iter().copied().filter(move |component| bits & 1 << component.number != 0)
    }

    /// The components in `bits` with their offsets in an area compacted to these (13.4.3).
    fn compacted(&self, bits: u64) -> impl Iterator<Item = (Component, usize)> {
        let mut end = EXTENDED;
        self.among(bits).map(move |component| {
            let at = if component.aligned { end.next_multiple_of(64) } else { end };
            end = at + component.bytes;
            (component, at)
        })
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};
    use kvm_bindings::kvm_regs;

    use super::super::linear::tests::paged;
    use super::*;
    use crate::memory::GuestRam;

    const AT: u64 = 0x4000_0000;

    /// Components 2 (256 bytes, at 576) and 5 (64 bytes, aligned, at 1088), as on a CPU with AVX-512 masks.
    fn state(in_use: u64, fill: u8) -> XState {
        let leaf = |index, offset, bytes, flags| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            eax: bytes,
            ebx: offset,
            ecx: flags,
            ..Default::default()
        };
        let mut area = vec![fill; 1152];
        area[24..28].copy_from_slice(&0x1f00_u32.to_le_bytes());
        area[HEADER].fill(0);
        area[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
        XState::new(area, &[leaf(5, 1088, 64, 2), leaf(2, 576, 256, 0), leaf(11, 0, 16, 1)], 0x27)
    }

    fn run(state: &mut XState, code: &[u8], asked: u64, ram: &GuestRam, at: u64) -> Result<(), Stop> {
        let (_, mut sregs) = paged();
        sregs.cr4 |= 1 << 18;
        sregs.cs.l = 1;
        let regs = kvm_regs { rax: asked, rdi: at, ..Default::default() };
        let mut cpu = Cpu { regs, sregs, x87_pending: false };
        let instruction = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).decode();
        let kind = kind(instruction.mnemonic()).unwrap();
        state.run(kind, &instruction, &mut cpu, &Linear::new(ram, &sregs))
    }

    const XSAVE: [u8; 3] = [0x0f, 0xae, 0x27];
    const XSAVES: [u8; 3] = [0x0f, 0xc7, 0x2f];
    const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2f];
    const XRSTORS: [u8; 3] = [0x0f, 0xc7, 0x1f];

    fn word(ram: &GuestRam, offset: u64) -> u64 {
        let (_, sregs) = paged();
        let mut bytes = [0; 8];
        Linear::new(ram, &sregs).read(AT + offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn what_is_saved_comes_back() {
        for (save, restore) in [(XSAVE, XRSTOR), (XSAVES, XRSTORS), (XSAVES, XRSTOR)] {
            let (ram, _) = paged();
            let mut from = state(0x27, 0x5a);
            run(&mut from, &save, 0x27, &ram, AT).unwrap();
            let mut to = state(0, 0);
            run(&mut to, &restore, u64::MAX, &ram, AT).unwrap();
            assert!(to.bytes()[..28] == from.bytes()[..28] && to.bytes()[32..416] == from.bytes()[32..416]);
            assert!(
                to.bytes()[512..832] == from.bytes()[512..832] && to.bytes()[1088..] == from.bytes()[1088..]
            );
        }
    }

    #[test]
    fn a_compacted_area_leaves_no_gaps_but_for_alignment() {
        let (ram, _) = paged();
        run(&mut state(0x24, 0x5a), &XSAVES, 0x26, &ram, AT).unwrap();
        assert_eq!((word(&ram, 512), word(&ram, 520)), (0x24, COMPACTED | 0x26));
        assert_eq!(word(&ram, 160), 0, "XMM registers are not in use");
        let filled = u64::from_le_bytes([0x5a; 8]);
        assert_eq!([word(&ram, 576), word(&ram, 824), word(&ram, 832), word(&ram, 888)], [filled; 4]);
        assert_eq!(word(&ram, 896), 0);
    }

    #[test]
    fn what_is_not_asked_for_stays() {
        let (ram, _) = paged();
        run(&mut state(0x27, 0x5a), &XSAVE, 0x4, &ram, AT).unwrap();
        assert_eq!((word(&ram, 512), word(&ram, 0), word(&ram, 1088)), (4, 0, 0));
        let mut to = state(0x27, 0x11);
        run(&mut to, &XRSTOR, 0x24, &ram, AT).unwrap();
        assert_eq!(to.in_use(), 0x7, "masks get their first value");
        assert_eq!((to.bytes()[0], to.bytes()[160], to.bytes()[576]), (0x11, 0x11, 0x5a));
    }

    #[test]
    fn nonsense_is_a_fault_and_changes_nothing() {
        let (ram, sregs) = paged();
        let memory = Linear::new(&ram, &sregs);
        let mut to = state(0x27, 0x11);
        let before = to.bytes().to_vec();
        let refused = |to: &mut XState| {
            assert_eq!(run(to, &XRSTOR, u64::MAX, &ram, AT), Err(GENERAL_PROTECTION.into()));
            memory.write(AT + 512, &[0; 64]).unwrap();
            memory.write(AT + 24, &[0; 8]).unwrap();
        };
        memory.write(AT + 512, &0x40_u64.to_le_bytes()).unwrap();
        refused(&mut to);
        memory.write(AT + 520, &(COMPACTED | 0x40).to_le_bytes()).unwrap();
        refused(&mut to);
        memory.write(AT + 530, &[1]).unwrap();
        refused(&mut to);
        memory.write(AT + 26, &[1]).unwrap();
        refused(&mut to);
        assert_eq!(run(&mut to, &XRSTOR, 7, &ram, AT + 8), Err(GENERAL_PROTECTION.into()));
        assert!(matches!(run(&mut to, &XSAVE, 7, &ram, 0x40_1000), Err(Stop::Raise(_))), "read-only");
        assert_eq!(to.bytes(), before);
    }
}
