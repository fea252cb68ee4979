//! Ring-0 instructions that some KVMs do not emulate, on real KVM: whoever carries them out, hardware or we, they do what
//! the manual says.

mod support;

use std::arch::global_asm;
use std::io::Write;

use support::{Console, elf, kvm_usable};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};
use vmove_compute::kvm::ExitReason;
use vmove_compute::machine::{Machine, MachineConfig};

// A kernel for 64-bit mode, wherever it lies: the handler of #BP at 2 MiB's interrupt table, an FPU area behind it, results
// at 0x220000. Its code is never run here.
global_asm!(
    r#"
    .pushsection .rodata
    .global instructions_start, instructions_end
instructions_start:
    mov edi, 0x220000
    // Vector 3: offset, selector 0x10, present 64-bit interrupt gate.
    lea rax, [rip + 90f]
    mov edx, 0x200030
    mov [rdx], ax
    mov word ptr [rdx + 2], 0x10
    mov word ptr [rdx + 4], 0x8e00
    shr rax, 16
    mov [rdx + 6], ax
    mov word ptr [rdx + 0x1000], 0xfff
    mov qword ptr [rdx + 0x1002], 0x200000
    lidt [rdx + 0x1000]
    int3
    fwait
    // Results 1 and 2: RFLAGS.AC, where the CPU has the instructions (leaf 7, EBX bit 20).
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov qword ptr [rdi + 8], 0x40000
    test ebx, 0x100000
    jz 10f
    stac
    pushfq
    pop rax
    and eax, 0x40000
    mov [rdi + 8], rax
    clac
    pushfq
    pop rax
    and eax, 0x40000
    mov [rdi + 16], rax
10:
    // Results 3 and 4: bits.
    mov rax, -1
    mov r9d, 0x70000001
    popcnt eax, r9d
    mov [rdi + 24], rax
    mov [rdi + 32], r9
    popcnt rax, [rdi + 32]
    mov [rdi + 32], rax
    // Results 5 to 8: what a failed exchange found, what a good one left.
    mov esi, 0x220100
    mov qword ptr [rsi], 11
    mov qword ptr [rsi + 8], 12
    xor eax, eax
    xor edx, edx
    mov ebx, 21
    mov ecx, 22
    lock cmpxchg16b [rsi]
    mov [rdi + 40], rax
    mov [rdi + 48], rdx
    lock cmpxchg16b [rsi]
    mov rax, [rsi]
    mov [rdi + 56], rax
    mov rax, [rsi + 8]
    mov [rdi + 64], rax
    // Results 9 and 10: XMM0 saved and restored; 11 and 12: the same, compacted where the CPU can.
    mov rax, cr4
    or rax, 0x40200
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3
    xsetbv
    mov qword ptr [rsi], 31
    mov qword ptr [rsi + 8], 32
    movups xmm0, [rsi]
    mov r8d, 0x210000
    xsave [r8]
    movups xmm0, [rsi + 16]
    xrstor [r8]
    movups [rdi + 72], xmm0
    mov eax, 0xd
    mov ecx, 1
    cpuid
    mov r10d, eax
    mov eax, 3
    xor edx, edx
    test r10d, 2
    jz 20f
    mov r8d, 0x211000
    xsavec [r8]
20:
    movups xmm0, [rsi + 16]
    xrstor [r8]
    movups [rdi + 88], xmm0
    mov edx, 0x604
    mov eax, 0x2000
    out dx, ax
    hlt
90:
    inc qword ptr [rdi]
    iretq
instructions_end:
    .popsection
"#
);

unsafe extern "C" {
    static instructions_start: u8;
    static instructions_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const instructions_start, &raw const instructions_end);
    // SAFETY: both are labels in one run of read-only bytes, in this order.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

fn boot(code: &[u8]) -> Machine {
    let mut kernel = NamedTempFile::new().unwrap();
    kernel.write_all(&elf(code, false)).unwrap();
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: 16 << 20,
        kernel: Some(kernel.path().to_owned()),
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        networks: Vec::new(),
    };
    let machine = Machine::boot(config, Console::new().sink()).unwrap();
    machine.resume().unwrap();
    machine
}

#[test]
fn a_kernel_may_use_what_its_emulator_does_not_know() {
    if !kvm_usable("instructions") {
        return;
    }
    let machine = boot(code());
    assert_eq!(machine.wait_exit(), ExitReason::Shutdown);
    let results: [u64; 13] = machine.ram().memory().read_obj(GuestAddress(0x22_0000)).unwrap();
    assert_eq!(results[0], 1, "one breakpoint");
    assert_eq!(results[1..3], [0x4_0000, 0], "stac, clac");
    assert_eq!(results[3..5], [4, 4], "popcnt");
    assert_eq!(results[5..9], [11, 12, 21, 22], "cmpxchg16b");
    assert_eq!(results[9..11], [31, 32], "xsave, xrstor");
    assert_eq!(results[11..13], [31, 32], "xsavec, xrstor");
}

#[test]
fn an_instruction_that_nobody_knows_is_named() {
    if !kvm_usable("unknown instruction") {
        return;
    }
    // addss xmm0, xmm1; mov edx, 0x604; mov eax, 0x2000; out dx, ax; hlt
    let code = [0xf3, 0x0f, 0x58, 0xc1, 0xba, 0x04, 0x06, 0, 0, 0xb8, 0x00, 0x20, 0, 0, 0x66, 0xef, 0xf4];
    match boot(&code).wait_exit() {
        // The CPU runs it.
        ExitReason::Shutdown => {}
        ExitReason::Error(text) => {
            assert!(
                text.contains("addss xmm0,xmm1 (f3 0f 58 c1)") && text.contains("rip 0x100000"),
                "{text}"
            );
        }
        ExitReason::Reset => panic!("a reset"),
    }
}
