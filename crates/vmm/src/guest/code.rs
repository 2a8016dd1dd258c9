//! The guest's machine code, assembled when it is needed.

use super::{
    CLOCK, COUNT, CRASH, FILL, GARBAGE, GARBAGE_PORTS, HALT, IN, OUT, PORT, READ, START, SUM, TSC,
    WRITE, more,
};

/// Where the program is loaded and starts.
pub const LOAD_ADDRESS: u64 = 0x1000;
/// The four bytes that [`COUNT`] increments.
pub const COUNTER: u32 = 0x2000;

/// A place in the program; jumps to it may come before it is known.
#[derive(Clone, Copy)]
pub(super) struct Label(usize);

#[derive(Default)]
pub(super) struct Assembler {
    pub(super) bytes: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Where a 32-bit relative address must be put, and of which label.
    patches: Vec<(usize, Label)>,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.bytes.len());
    }

    pub(super) fn emit(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn emit_with(&mut self, opcode: &[u8], operand: u32) {
        self.emit(opcode);
        self.emit(&operand.to_le_bytes());
    }

    /// `opcode` followed by the distance to `label`.
    pub(super) fn jump(&mut self, opcode: &[u8], label: Label) {
        self.emit(opcode);
        self.patches.push((self.bytes.len(), label));
        self.emit(&[0; 4]);
    }

    /// Reads the device's port at `offset` into eax.
    pub(super) fn input(&mut self, offset: u32) {
        self.emit_with(&[0xba], PORT as u32 + offset); // mov edx, port
        self.emit(&[0xed]); // in eax, dx
    }

    fn finish(mut self) -> Vec<u8> {
        for (at, label) in self.patches {
            let target = self.labels[label.0].expect("every label of the fixed program is placed");
            let distance = target as i32 - (at as i32 + 4);
            self.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        self.bytes
    }
}

const JE: [u8; 2] = [0x0f, 0x84];
const JNE: [u8; 2] = [0x0f, 0x85];
pub(super) const JMP: [u8; 1] = [0xe9];

const COMMANDS: [u32; 14] = [
    FILL,
    SUM,
    COUNT,
    HALT,
    READ,
    CRASH,
    WRITE,
    TSC,
    CLOCK,
    START,
    OUT,
    IN,
    GARBAGE,
    GARBAGE_PORTS,
];

/// The program, position-dependent on [`LOAD_ADDRESS`] only through absolute data addresses.
pub fn program() -> Vec<u8> {
    let mut a = Assembler::default();
    let [start, report] = [(); 2].map(|()| a.label());
    let commands = COMMANDS.map(|op| (op, a.label()));
    a.place(start);
    a.input(0);
    for (op, label) in commands {
        a.emit(&[0x83, 0xf8, op as u8]); // cmp eax, op
        a.jump(&JE, label);
    }
    a.jump(&JMP, start);
    a.place(report);
    a.emit_with(&[0xba], PORT as u32 + 0x14); // mov edx, report port
    a.emit(&[0xef]); // out dx, eax
    a.jump(&JMP, start);
    for (op, label) in commands {
        a.place(label);
        match op {
            FILL => fill(&mut a, report),
            SUM => sum(&mut a, report),
            COUNT => count(&mut a, start),
            READ => {
                a.input(4);
                a.emit(&[0x8b, 0x00]); // mov eax, [eax]
                a.jump(&JMP, report);
            }
            HALT => a.emit(&[0xfa, 0xf4, 0xeb, 0xfc]), // cli; hlt; jmp back to cli
            WRITE => more::write(&mut a, report),
            TSC => more::tsc(&mut a, report),
            CLOCK => more::clock(&mut a, report),
            START => more::start(&mut a, report),
            OUT => more::output(&mut a, report),
            IN => more::input(&mut a, report),
            GARBAGE => more::garbage(&mut a, report),
            GARBAGE_PORTS => more::garbage_ports(&mut a, report),
            _ => {
                a.emit_with(&[0x0f, 0x01, 0x1d], COUNTER + 0x100); // lidt [zeroes]
                a.emit(&[0xcc]); // int3
            }
        }
    }
    a.finish()
}

/// Loads edi = argument 0, ecx = argument 1, eax = argument 2.
pub(super) fn arguments(a: &mut Assembler) {
    a.input(4);
    a.emit(&[0x89, 0xc7]); // mov edi, eax
    a.input(8);
    a.emit(&[0x89, 0xc1]); // mov ecx, eax
    a.input(12);
}

/// Loads edi = address of the first page, ecx = pages, eax = argument 2.
fn range(a: &mut Assembler) {
    arguments(a);
    a.emit(&[0xc1, 0xe7, 0x0c]); // shl edi, 12
}

fn fill(a: &mut Assembler, report: Label) {
    range(a);
    let top = a.bytes.len();
    a.emit(&[0x89, 0x07]); // mov [edi], eax
    a.emit(&[0x40]); // inc eax
    next_page(a, top);
    a.emit(&[0x31, 0xc0]); // xor eax, eax
    a.jump(&JMP, report);
}

fn sum(a: &mut Assembler, report: Label) {
    range(a);
    a.emit(&[0x31, 0xdb]); // xor ebx, ebx
    let top = a.bytes.len();
    a.emit(&[0xd1, 0xc3]); // rol ebx, 1
    a.emit(&[0x03, 0x1f]); // add ebx, [edi]
    next_page(a, top);
    a.emit(&[0x89, 0xd8]); // mov eax, ebx
    a.jump(&JMP, report);
}

fn next_page(a: &mut Assembler, top: usize) {
    a.emit_with(&[0x81, 0xc7], 4096); // add edi, 4096
    let distance = top as i32 - (a.bytes.len() as i32 + 2);
    a.emit(&[0xe2, distance as i8 as u8]); // loop top
}

fn count(a: &mut Assembler, start: Label) {
    let top = a.label();
    a.place(top);
    a.emit_with(&[0xff, 0x05], COUNTER); // inc dword [counter]
    a.emit_with(&[0xf7, 0x05], COUNTER); // test dword [counter], 1023
    a.emit(&1023u32.to_le_bytes());
    a.jump(&JNE, top);
    a.input(0x10);
    a.emit(&[0x85, 0xc0]); // test eax, eax
    a.jump(&JE, top);
    a.jump(&JMP, start);
}
