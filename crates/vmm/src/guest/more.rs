//! Machine code of the commands that deal with clocks, other CPUs and devices.

use super::code::{Assembler, JMP, Label, arguments};

/// The page at which [`second_program`] is found, the first of those for other CPUs.
pub const SECOND_PAGE: u32 = 0x10;
/// Where in its page each other CPU counts.
pub const SECOND_COUNTER: u32 = 0x800;

const APIC_COMMAND_LOW: u32 = 0xfee0_0300;
const APIC_COMMAND_HIGH: u32 = 0xfee0_0310;
const KVMCLOCK: u32 = 0x4b56_4d01;

/// What a CPU runs that is not the first: it counts in its own page, in real mode.
pub fn second_program() -> [u8; 11] {
    [
        0x8c, 0xc8, // mov ax, cs
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xff, 0x06, 0x00, 0x08, // inc dword [SECOND_COUNTER]
        0xeb, 0xf9, // jmp back to inc
    ]
}

fn done(a: &mut Assembler, report: Label) {
    a.emit(&[0x31, 0xc0]); // xor eax, eax
    a.jump(&JMP, report);
}

pub(super) fn write(a: &mut Assembler, report: Label) {
    a.input(4);
    a.emit(&[0x89, 0xc7]); // mov edi, eax
    a.input(8);
    a.emit(&[0x89, 0x07]); // mov [edi], eax
    done(a, report);
}

pub(super) fn tsc(a: &mut Assembler, report: Label) {
    a.emit(&[0x0f, 0x31]); // rdtsc
    a.emit(&[0x0f, 0xac, 0xd0, 0x10]); // shrd eax, edx, 16
    a.jump(&JMP, report);
}

pub(super) fn clock(a: &mut Assembler, report: Label) {
    a.input(4);
    a.emit(&[0x31, 0xd2]); // xor edx, edx
    a.emit_with(&[0xb9], KVMCLOCK); // mov ecx, the clock's register
    a.emit(&[0x0f, 0x30]); // wrmsr
    done(a, report);
}

/// INIT, then the start-up message.
pub(super) fn start(a: &mut Assembler, report: Label) {
    a.input(4);
    a.emit(&[0xc1, 0xe0, 0x18]); // shl eax, 24
    a.emit_with(&[0xa3], APIC_COMMAND_HIGH); // mov [command high], eax
    a.emit_with(&[0xb8], 0x4500); // mov eax, INIT
    a.emit_with(&[0xa3], APIC_COMMAND_LOW);
    a.input(8);
    a.emit_with(&[0x0d], 0x4600); // or eax, start-up
    a.emit_with(&[0xa3], APIC_COMMAND_LOW);
    done(a, report);
}

pub(super) fn output(a: &mut Assembler, report: Label) {
    a.input(8);
    a.emit(&[0x89, 0xc3]); // mov ebx, eax
    a.input(4);
    a.emit(&[0x89, 0xc2]); // mov edx, eax
    a.emit(&[0x89, 0xd8]); // mov eax, ebx
    a.emit(&[0xee]); // out dx, al
    done(a, report);
}

pub(super) fn input(a: &mut Assembler, report: Label) {
    a.input(4);
    a.emit(&[0x89, 0xc2]); // mov edx, eax
    a.emit(&[0x31, 0xc0]); // xor eax, eax
    a.emit(&[0xec]); // in al, dx
    a.jump(&JMP, report);
}

/// Turns eax into the next number.
fn next_number(a: &mut Assembler) {
    a.emit_with(&[0x69, 0xc0], 1_664_525); // imul eax, eax, …
    a.emit_with(&[0x05], 1_013_904_223); // add eax, …
}

fn loop_to(a: &mut Assembler, top: usize) {
    let distance = top as i32 - (a.bytes.len() as i32 + 2);
    a.emit(&[0xe2, distance as i8 as u8]); // loop top
}

pub(super) fn garbage(a: &mut Assembler, report: Label) {
    arguments(a);
    let top = a.bytes.len();
    a.emit(&[0x89, 0x07]); // mov [edi], eax
    next_number(a);
    a.emit(&[0x83, 0xc7, 0x04]); // add edi, 4
    loop_to(a, top);
    done(a, report);
}

pub(super) fn garbage_ports(a: &mut Assembler, report: Label) {
    arguments(a);
    let top = a.bytes.len();
    a.emit(&[0x89, 0xfa]); // mov edx, edi
    a.emit(&[0xee]); // out dx, al
    next_number(a);
    a.emit(&[0xef]); // out dx, eax
    a.emit(&[0xec]); // in al, dx
    next_number(a);
    a.emit(&[0x47]); // inc edi
    loop_to(a, top);
    done(a, report);
}
