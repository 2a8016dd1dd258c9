//! Several vCPUs, and clocks, across fork, branch and the files.

use std::time::{Duration, Instant};

use forkd_vmm::client::Process;
use forkd_vmm::guest::{CLOCK, READ, SECOND_COUNTER, SECOND_PAGE, START, TSC};
use forkd_wire::vmm::Request;

use crate::driver::{read, write};
use crate::support::{MIB, World, eventually, kvm, load, program};

fn counter(guest: &mut Process, cpu: u32) -> u32 {
    read(guest, (SECOND_PAGE + cpu - 1) * 4096 + SECOND_COUNTER)
}

/// Waits until each of the other CPUs has counted on from `from`.
fn all_count(guest: &mut Process, from: &[u32]) {
    let cell = std::cell::RefCell::new(guest);
    for (cpu, from) in (1..).zip(from) {
        eventually("every CPU counts", || {
            counter(&mut cell.borrow_mut(), cpu) > *from
        });
    }
}

fn counters(guest: &mut Process, cpus: u32) -> Vec<u32> {
    (1..cpus).map(|cpu| counter(guest, cpu)).collect()
}

/// Boots, starts every CPU, branches in the middle, and lets copies of all kinds go on.
fn branch_with(cpus: u32) {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let argument = format!("--vcpus={cpus}");
    let mut parent = Process::boot_test_guest(program(), MIB, &[&argument]).unwrap();
    for cpu in 1..cpus {
        parent.run(START, [cpu, SECOND_PAGE + cpu - 1, 0]).unwrap();
    }
    all_count(&mut parent, &vec![0; cpus as usize - 1]);
    let before = counters(&mut parent, cpus);
    let mut branch = parent.branch().unwrap();
    let after = counters(&mut parent, cpus);

    let check = |copy: &mut Process| {
        let first = counters(copy, cpus);
        for (found, before) in first.iter().zip(&before) {
            assert!(found >= before, "{found} goes on from {before}");
        }
        all_count(copy, &first);
    };
    // One at a time: every CPU of every machine counts as fast as it can.
    let mut copy = branch.template.fork_one().unwrap();
    check(&mut copy);
    // A branch of the copy, while its CPUs run.
    let mut second = copy.branch().unwrap();
    drop(copy);
    check(&mut second.template.fork_one().unwrap());
    drop(second);

    let files = directory.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let (files, _) = branch.template.write(&Request::Write, &files).unwrap();
    check(&mut load("base", &[files]).fork_one().unwrap());
    // The original's CPUs never stopped for good.
    all_count(&mut parent, &after);
}

#[test]
fn two_cpus_go_on_after_fork_and_branch() {
    branch_with(2);
}

#[test]
fn four_cpus_go_on_after_fork_and_branch() {
    branch_with(4);
}

#[test]
fn a_machine_has_at_most_thirty_two_cpus() {
    if !kvm() {
        return;
    }
    let mut largest = Process::boot_test_guest(program(), MIB, &["--vcpus=32"]).unwrap();
    let mut branch = largest.branch().unwrap();
    drop(largest);
    branch.template.fork_one().unwrap();
    let arguments = ["boot", "--test-guest", "--vcpus=33"].map(str::to_owned);
    let mut refused = Process::start(program(), &arguments).unwrap();
    match refused.next().unwrap().1 {
        forkd_wire::vmm::Reply::Failed(failure) => {
            assert!(failure.message.contains("1 to 32"), "{}", failure.message);
        }
        other => panic!("{other:?}"),
    }
}

/// The counter without its lowest 16 bits.
fn tsc(guest: &mut Process) -> u64 {
    guest.run(TSC, [0; 3]).unwrap()
}

/// Ticks (of 2^16 cycles) that pass on this machine in a time.
fn ticks(time: Duration) -> u64 {
    let kvm = forkd_vmm::host::Host::open().unwrap();
    let vm = forkd_vmm::kvm::create_vm(&kvm.kvm).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let khz = u64::from(forkd_vmm::host::tsc_khz(&vcpu).unwrap());
    (khz * time.as_millis() as u64) >> 16
}

#[test]
fn a_young_time_stamp_counter_goes_on_from_where_it_stood() {
    // Some kernels take so young a counter for one that shall be synchronised.
    the_counter_goes_on_after(Duration::ZERO);
}

#[test]
fn the_time_stamp_counter_goes_on_from_where_it_stood() {
    the_counter_goes_on_after(Duration::from_millis(2500));
}

fn the_counter_goes_on_after(age: Duration) {
    let Some(mut world) = World::new() else {
        return;
    };
    std::thread::sleep(age);
    let before = tsc(&mut world.parent);
    let (mut template, _) = world.template();
    let frozen = tsc(&mut world.parent);
    let pause = Duration::from_millis(1500);
    std::thread::sleep(pause);
    let forked = Instant::now();
    let mut copy = template.fork_one().unwrap();
    let first = tsc(&mut copy);
    let mut lived = forked.elapsed() + pause / 3;
    println!("counters: {before} before, {frozen} at the branch, {first} in the copy");
    assert!(first >= before, "{first} is not before {before}");
    // The time in which it did not exist has not passed for it; but without help of the hardware the
    // guest reads the counter of the host.
    if !forkd_vmm::host::hardware_virtualization() {
        lived += pause;
    }
    let most = frozen + ticks(lived);
    assert!(first <= most, "{first} is later than {most}");
    let second = tsc(&mut copy);
    assert!(second >= first);
    // The original's clock has not been touched.
    assert!(tsc(&mut world.parent) >= frozen + ticks(pause));
}

/// Where the guest has its clock written.
const CLOCK_AT: u32 = 0x3000;

/// The kvmclock's time as a guest computes it: the time noted, and what the counter has counted since.
/// `None` where the host notes it anew faster than it can be read from here.
fn nanoseconds(guest: &mut Process) -> Option<u64> {
    for _ in 0..20 {
        let word = |guest: &mut Process, at| guest.run(READ, [CLOCK_AT + at, 0, 0]).unwrap();
        let version = word(guest, 0);
        let now = tsc(guest) << 16;
        let long = |guest: &mut Process, at| word(guest, at) | word(guest, at + 4) << 32;
        let (stamp, noted) = (long(guest, 8), long(guest, 16));
        let (scale, shift) = (word(guest, 24), (word(guest, 28) & 0xff) as u8 as i8);
        if version % 2 == 1 || word(guest, 0) != version {
            continue;
        }
        let passed = now.saturating_sub(stamp);
        let passed = if shift < 0 {
            passed >> -shift
        } else {
            passed << shift
        };
        return Some(noted + ((u128::from(passed) * u128::from(scale)) >> 32) as u64);
    }
    None
}

#[test]
fn the_kvmclock_goes_on_from_where_it_stood() {
    let Some(mut world) = World::new() else {
        return;
    };
    std::thread::sleep(Duration::from_millis(1200));
    write(&mut world.parent, CLOCK_AT, 0);
    world.parent.run(CLOCK, [CLOCK_AT | 1, 0, 0]).unwrap();
    if read(&mut world.parent, CLOCK_AT) == 0 {
        println!("skipped: this /dev/kvm has no kvmclock");
        return;
    }
    let Some(before) = nanoseconds(&mut world.parent) else {
        println!("skipped: the host rewrites the clock whenever the CPU is entered");
        return;
    };
    let (mut template, files) = world.template();
    let frozen = nanoseconds(&mut world.parent).unwrap();
    let pause = Duration::from_millis(1500);
    std::thread::sleep(pause);
    let mut loaded = load("again", &[files]);
    for template in [&mut template, &mut loaded] {
        let forked = Instant::now();
        let mut copy = template.fork_one().unwrap();
        let first = nanoseconds(&mut copy).unwrap();
        let lived = forked.elapsed() + pause / 3;
        assert!(first >= before, "{first} is not before {before}");
        let most = frozen + lived.as_nanos() as u64;
        assert!(first <= most, "{first} is later than {most}");
        let second = nanoseconds(&mut copy).unwrap();
        assert!(second >= first, "{second} follows {first}");
    }
    assert!(nanoseconds(&mut world.parent).unwrap() >= frozen + pause.as_nanos() as u64);
}
