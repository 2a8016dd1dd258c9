//! The two filters together allow a vCPU thread what it needs and nothing of the main thread's. The
//! kernel is not asked: the filters' programs are run here.

use super::*;

const LOAD: u16 = 0x20; // ld [k]
const JUMP: u16 = 0x05; // ja k
const RETURN: u16 = 0x06;
const ARCHITECTURE: u32 = 0xc000_003e;

/// What the program answers for a system call with this second argument.
fn verdict(program: &BpfProgram, call: i64, argument: u64) -> u32 {
    let mut data = [0u8; 64];
    data[..4].copy_from_slice(&(call as u32).to_le_bytes());
    data[4..8].copy_from_slice(&ARCHITECTURE.to_le_bytes());
    data[24..32].copy_from_slice(&argument.to_le_bytes());
    let (mut at, mut a) = (0, 0u32);
    loop {
        let one = &program[at];
        at += 1;
        let k = one.k;
        match one.code {
            LOAD => a = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
            JUMP => at += k as usize,
            RETURN => return k,
            0x54 => a &= k,
            code if code & 7 == 5 => {
                let holds = match code & 0xf0 {
                    0x10 => a == k,
                    0x20 => a > k,
                    0x30 => a >= k,
                    _ => panic!("jump {code:#x}"),
                };
                at += usize::from(if holds { one.jt } else { one.jf });
            }
            code => panic!("instruction {code:#x}"),
        }
    }
}

const ALLOWED: u32 = 0x7fff_0000;
const KILLED: u32 = 0x8000_0000;

#[test]
fn a_vcpu_thread_loses_what_is_the_main_threads() {
    let filter = vcpu_filter();
    assert!(filter.len() < 32, "short: every fork installs it");
    for call in MAIN_THREAD {
        assert_eq!(verdict(&filter, *call, 0), KILLED, "call {call}");
    }
    for call in EVERY_THREAD {
        assert_eq!(verdict(&filter, *call, 0), ALLOWED, "call {call}");
        assert!(!MAIN_THREAD.contains(call));
    }
}

#[test]
fn a_vcpu_thread_has_few_ioctls() {
    let filter = vcpu_filter();
    for request in VCPU_IOCTLS {
        assert_eq!(verdict(&filter, libc::SYS_ioctl, request), ALLOWED);
    }
    // Creating a VM, a memory slot, setting registers, scanning page maps, terminals.
    for request in [0xae01, 0x4020_ae46, 0x4090_ae82, PAGEMAP_SCAN, 0x5401] {
        assert_eq!(
            verdict(&filter, libc::SYS_ioctl, request),
            KILLED,
            "{request:#x}"
        );
    }
}
