//! The instructions that work on general registers, flags and memory (Intel SDM vol. 2, by their names).
//!
//! What never enters: KVM, FPU state.

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_regs;
use vm_memory::bitmap::Bitmap;

use super::linear::{Linear, Slice};
use super::{Cpu, Exception, Stop};

/// Vector of #BP.
pub(super) const BREAKPOINT: u8 = 3;
const DEVICE_NOT_AVAILABLE: Exception = Exception { vector: 7, code: None, address: 0 };
const FLOATING_POINT: Exception = Exception { vector: 16, code: None, address: 0 };

const CR0_MP: u64 = 1 << 1;
const CR0_TS: u64 = 1 << 3;
const ZERO_FLAG: u64 = 1 << 6;
const ALIGNMENT_CHECK: u64 = 1 << 18;
/// Carry, parity, adjust, zero, sign, overflow.
const STATUS_FLAGS: u64 = 1 | 1 << 2 | 1 << 4 | ZERO_FLAG | 1 << 7 | 1 << 11;

/// Carries out an instruction; the caller moves RIP.
pub(super) fn run(instruction: &Instruction, cpu: &mut Cpu, memory: &Linear<'_>) -> Result<(), Stop> {
    match instruction.mnemonic() {
        Mnemonic::Int3 => Err(Exception { vector: BREAKPOINT, code: None, address: 0 }.into()),
        Mnemonic::Wait if cpu.sregs.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS => {
            Err(DEVICE_NOT_AVAILABLE.into())
        }
        Mnemonic::Wait if cpu.x87_pending => Err(FLOATING_POINT.into()),
        Mnemonic::Wait => Ok(()),
        Mnemonic::Clac => {
            cpu.regs.rflags &= !ALIGNMENT_CHECK;
            Ok(())
        }
        Mnemonic::Stac => {
            cpu.regs.rflags |= ALIGNMENT_CHECK;
            Ok(())
        }
        Mnemonic::Popcnt => popcnt(instruction, cpu, memory),
        Mnemonic::Cmpxchg16b => compare_and_exchange(instruction, cpu, memory),
        _ => Err(Stop::Unknown("KVM does not emulate it, and it is not known here")),
    }
}

fn popcnt(instruction: &Instruction, cpu: &mut Cpu, memory: &Linear<'_>) -> Result<(), Stop> {
    let to = instruction.op_register(0);
    let value = if instruction.op_kind(1) == OpKind::Register {
        get(&cpu.regs, instruction.op_register(1))?
    } else {
        let mut bytes = [0; 8];
        memory.read(address(instruction, 1, cpu)?, &mut bytes[..to.size()])?;
        u64::from_le_bytes(bytes)
    };
    put(&mut cpu.regs, to, u64::from(value.count_ones()))?;
    cpu.regs.rflags &= !STATUS_FLAGS;
    if value == 0 {
        cpu.regs.rflags |= ZERO_FLAG;
    }
    Ok(())
}

/// CMPXCHG16B, with or without LOCK: always atomic against other vCPUs.
fn compare_and_exchange(instruction: &Instruction, cpu: &mut Cpu, memory: &Linear<'_>) -> Result<(), Stop> {
    let slice = memory.aligned(address(instruction, 0, cpu)?, 16)?;
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let old = pair(cpu.regs.rdx, cpu.regs.rax);
    let found = exchange16(&slice, old, pair(cpu.regs.rcx, cpu.regs.rbx))?;
    if found == old {
        cpu.regs.rflags |= ZERO_FLAG;
    } else {
        cpu.regs.rflags &= !ZERO_FLAG;
        (cpu.regs.rdx, cpu.regs.rax) = ((found >> 64) as u64, found as u64);
    }
    Ok(())
}

/// Puts `new` in the place of `old` in 16 bytes of guest RAM, if that is there; gives what was there.
fn exchange16(slice: &Slice<'_>, old: u128, new: u128) -> Result<u128, Stop> {
    if !is_x86_feature_detected!("cmpxchg16b") {
        return Err(Stop::Unknown("the host's CPU has no such instruction"));
    }
    let guard = slice.ptr_guard_mut();
    // SAFETY: the instruction exists (asked above). The slice is 16 bytes of mapped guest RAM, aligned (the guest's
    // address is, and a mapping begins at a page); vCPUs and devices use them at the same time as memory that may change
    // at any moment, and this access is atomic.
    let found = unsafe { exchange(guard.as_ptr().cast(), old, new) };
    if found == old {
        slice.bitmap().mark_dirty(0, 16);
    }
    Ok(found)
}

/// The instruction itself.
///
/// # Safety
/// The CPU has it; `at` is valid for it and aligned to 16 bytes.
unsafe fn exchange(at: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: `at` is as the caller promises. RBX, which the compiler may need for itself, has its value back at the end.
    // `core::arch::x86_64::cmpxchg16b` would be it, but its use asks for a library that is not linked.
    unsafe {
        asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            in("rdi") at,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

/// The linear address of a memory operand.
pub(super) fn address(instruction: &Instruction, operand: u32, cpu: &Cpu) -> Result<u64, Stop> {
    let value = |register: Register| match register {
        Register::CS => Some(cpu.sregs.cs.base),
        Register::DS => Some(cpu.sregs.ds.base),
        Register::ES => Some(cpu.sregs.es.base),
        Register::SS => Some(cpu.sregs.ss.base),
        Register::FS => Some(cpu.sregs.fs.base),
        Register::GS => Some(cpu.sregs.gs.base),
        _ => get(&cpu.regs, register).ok(),
    };
    // In 64-bit mode four of the segments begin at 0 whatever their registers hold.
    let flat = |register: Register| {
        cpu.sregs.cs.l == 1 && matches!(register, Register::CS | Register::DS | Register::ES | Register::SS)
    };
    instruction
        .virtual_address(operand, 0, |register, _, _| if flat(register) { Some(0) } else { value(register) })
        .ok_or(Stop::Unknown("its operand is of a kind not known here"))
}

/// A general register's value, zero-extended.
fn get(regs: &kvm_regs, register: Register) -> Result<u64, Stop> {
    let mut regs = *regs;
    let whole = *slot(&mut regs, register)?;
    Ok(match register.size() {
        8 => whole,
        4 => whole & 0xffff_ffff,
        2 => whole & 0xffff,
        _ => return Err(Stop::Unknown("byte registers are not known here")),
    })
}

/// Sets a general register as the CPU does: 32 bits clear the upper half, 16 leave the rest.
fn put(regs: &mut kvm_regs, register: Register, value: u64) -> Result<(), Stop> {
    let whole = slot(regs, register)?;
    *whole = match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => *whole & !0xffff | value & 0xffff,
        _ => return Err(Stop::Unknown("byte registers are not known here")),
    };
    Ok(())
}

fn slot(regs: &mut kvm_regs, register: Register) -> Result<&mut u64, Stop> {
    Ok(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return Err(Stop::Unknown("it uses a register not known here")),
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};
    use kvm_bindings::kvm_sregs;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::linear::tests::paged;
    use super::*;
    use crate::memory::GuestRam;

    fn cpu(sregs: &kvm_sregs) -> Cpu {
        let mut cpu = Cpu {
            regs: kvm_regs { rflags: 2 | STATUS_FLAGS, ..Default::default() },
            sregs: *sregs,
            x87_pending: false,
        };
        cpu.sregs.cs.l = 1;
        cpu
    }

    fn execute(code: &[u8], cpu: &mut Cpu, ram: &GuestRam) -> Result<(), Stop> {
        let instruction = Decoder::with_ip(64, code, 0x40_0100, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), code.len(), "{code:02x?}");
        run(&instruction, cpu, &Linear::new(ram, &cpu.sregs.clone()))
    }

    #[test]
    fn flags_and_traps() {
        let (ram, sregs) = paged();
        let mut cpu = cpu(&sregs);
        execute(&[0x0f, 0x01, 0xcb], &mut cpu, &ram).unwrap();
        assert_eq!(cpu.regs.rflags & ALIGNMENT_CHECK, ALIGNMENT_CHECK);
        execute(&[0x0f, 0x01, 0xca], &mut cpu, &ram).unwrap();
        assert_eq!(cpu.regs.rflags & ALIGNMENT_CHECK, 0);
        let trap = execute(&[0xcc], &mut cpu, &ram);
        assert_eq!(trap, Err(Exception { vector: 3, code: None, address: 0 }.into()));
        assert_eq!(execute(&[0x9b], &mut cpu, &ram), Ok(()));
        cpu.x87_pending = true;
        assert_eq!(execute(&[0x9b], &mut cpu, &ram), Err(FLOATING_POINT.into()));
        cpu.sregs.cr0 |= CR0_TS | CR0_MP;
        assert_eq!(execute(&[0x9b], &mut cpu, &ram), Err(DEVICE_NOT_AVAILABLE.into()));
        assert!(
            matches!(execute(&[0x0f, 0x0b], &mut cpu, &ram), Err(Stop::Unknown(_))),
            "ud2 is the guest's own"
        );
    }

    #[test]
    fn bits_are_counted_in_registers_and_memory() {
        let (ram, sregs) = paged();
        let mut cpu = cpu(&sregs);
        (cpu.regs.rax, cpu.regs.r9) = (u64::MAX, 0xf0f0_f0f0_0000_0001);
        execute(&[0xf3, 0x49, 0x0f, 0xb8, 0xc1], &mut cpu, &ram).unwrap(); // popcnt rax, r9
        assert_eq!((cpu.regs.rax, cpu.regs.rflags), (17, 2));
        cpu.regs.rax = u64::MAX;
        execute(&[0xf3, 0x41, 0x0f, 0xb8, 0xc1], &mut cpu, &ram).unwrap(); // popcnt eax, r9d
        assert_eq!(cpu.regs.rax, 1);
        cpu.regs.rax = u64::MAX;
        execute(&[0x66, 0xf3, 0x0f, 0xb8, 0xc3], &mut cpu, &ram).unwrap(); // popcnt ax, bx
        assert_eq!((cpu.regs.rax, cpu.regs.rflags), (0xffff_ffff_ffff_0000, 2 | ZERO_FLAG));
        // popcnt rcx, gs:[rdi*8 + 8], across two pages
        ram.memory().write_obj(0xff_u64 | 1 << 63, GuestAddress(0x20_0ffc)).unwrap();
        (cpu.sregs.gs.base, cpu.regs.rdi) = (0x40_0fec, 1);
        execute(&[0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x0c, 0xfd, 8, 0, 0, 0], &mut cpu, &ram).unwrap();
        assert_eq!(cpu.regs.rcx, 9);
        // popcnt ecx, [rip + 0x2000]: no page there
        let fault = execute(&[0xf3, 0x0f, 0xb8, 0x0d, 0, 0x20, 0, 0], &mut cpu, &ram);
        assert_eq!(fault, Err(Exception { vector: 14, code: Some(0), address: 0x40_2108 }.into()));
    }

    #[test]
    fn sixteen_bytes_are_exchanged_if_they_are_as_expected() {
        let (ram, sregs) = paged();
        let mut cpu = cpu(&sregs);
        let at = GuestAddress(0x20_0040);
        ram.memory().write_obj([1_u64, 2], at).unwrap();
        let lock_cmpxchg16b = [0xf0, 0x48, 0x0f, 0xc7, 0x0e]; // [rsi]
        cpu.regs =
            kvm_regs { rsi: 0x40_0040, rax: 1, rdx: 9, rbx: 3, rcx: 4, rflags: 2 | ZERO_FLAG, ..cpu.regs };
        execute(&lock_cmpxchg16b, &mut cpu, &ram).unwrap();
        assert_eq!((cpu.regs.rax, cpu.regs.rdx, cpu.regs.rflags), (1, 2, 2), "what is there");
        assert_eq!(ram.memory().read_obj::<[u64; 2]>(at).unwrap(), [1, 2]);
        execute(&lock_cmpxchg16b, &mut cpu, &ram).unwrap();
        assert_eq!(cpu.regs.rflags, 2 | ZERO_FLAG);
        assert_eq!(ram.memory().read_obj::<[u64; 2]>(at).unwrap(), [3, 4]);
        cpu.regs.rsi += 8;
        let unaligned = execute(&lock_cmpxchg16b, &mut cpu, &ram);
        assert_eq!(unaligned, Err(Exception { vector: 13, code: Some(0), address: 0 }.into()));
        cpu.regs.rsi = 0x40_1000;
        let protected = execute(&lock_cmpxchg16b, &mut cpu, &ram);
        assert_eq!(protected, Err(Exception { vector: 14, code: Some(3), address: 0x40_1000 }.into()));
    }
}
