//! QEMU's command line. No I/O.
//!
//! A forked VM must have the very devices, in the very order, of the one that was booted: the command
//! lines differ only in how RAM is mapped and what happens first.

use std::ffi::OsString;
use std::os::fd::RawFd;

use forkd_wire::agent::AGENT_SERIAL_PORT;
use serde_json::json;

use super::Accel;
use super::walls::SANDBOX;
use crate::MachineSpec;

/// Translated guest code that is kept, MiB. Counts to every VM's private memory as it fills.
const TCG_CACHE_MIB: u32 = 32;

/// QEMU's number for the root disk among files that it is handed.
const DISK: u32 = 1;
/// Every guest has a network of its own, so they may all have the same address.
const MAC: &str = "02:f0:4b:00:00:01";

/// The machine, with every part that a distribution's kernel can do without left out. Timer, interrupt
/// controller and clock of old stay: without them Linux hangs measuring its clocks.
const MACHINE: &str = "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on,acpi=on,pcie=off,\
                       usb=off,auto-kernel-cmdline=off,suppress-vmdesc=on,mem-merge=off,\
                       dump-guest-core=off,memory-backend=ram";

/// What to start. Files are inherited and named by number: QEMU may see no others.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    pub(super) id: &'a str,
    pub(super) machine: &'a MachineSpec,
    pub(super) accel: Accel,
    /// RAM; opened once more by QEMU, for reading and writing.
    pub(super) ram: RawFd,
    /// The root disk, open for reading.
    pub(super) disk: RawFd,
    pub(super) start: Start,
    pub(super) sockets: Sockets,
    /// The network device's tap. Without, it is connected to nothing.
    pub(super) tap: Option<RawFd>,
    /// Whether QEMU filters its own system calls.
    pub(super) sandbox: bool,
}

/// What happens first.
#[derive(Debug)]
pub(super) enum Start {
    /// The kernel boots; RAM is the file.
    Boot {
        /// Rate of the time-stamp counter, where the guest cannot measure it well.
        tsc_khz: Option<u64>,
        /// The kernel; opened once more by QEMU.
        kernel: RawFd,
        /// The initial RAM file system; likewise.
        initramfs: RawFd,
    },
    /// State is read from a file; RAM begins as the file, and what is written stays private.
    Load {
        /// The file.
        state: RawFd,
    },
}

/// Listening sockets that QEMU inherits, by number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sockets {
    pub(super) control: RawFd,
    pub(super) agent: RawFd,
    pub(super) console: RawFd,
}

/// The arguments.
pub(super) fn arguments(launch: &Launch<'_>) -> Vec<OsString> {
    let machine = launch.machine;
    let boots = matches!(launch.start, Start::Boot { .. });
    let mut args = Args::default();
    args.pair("-name", name_argument(launch.id));
    args.flags("-nodefaults -no-user-config -no-reboot -display none -monitor none -vga none");
    args.pair("-machine", MACHINE);
    args.pair("-accel", accel_argument(launch.accel));
    args.pair("-cpu", launch.accel.cpu());
    args.pair("-smp", machine.vcpus.to_string());
    args.pair("-m", format!("{}M", machine.memory_mib));
    args.json(
        "-object",
        &json!({
            "qom-type": "memory-backend-file",
            "id": "ram",
            "mem-path": inherited(launch.ram),
            "size": machine.memory_mib << 20,
            "share": boots,
        }),
    );
    args.flags("-global virtio-mmio.force-legacy=off -global migration.send-configuration=off");
    channels(&mut args, launch.sockets);
    disk(&mut args, launch.disk);
    args.json(
        "-object",
        &json!({
            "qom-type": "rng-builtin", "id": "entropy",
        }),
    );
    args.json(
        "-device",
        &json!({"driver": "virtio-rng-device", "rng": "entropy"}),
    );
    if launch.sandbox {
        args.pair("-sandbox", SANDBOX);
    }
    if machine.network {
        network(&mut args, launch.tap);
    }
    match launch.start {
        Start::Boot {
            tsc_khz,
            kernel,
            initramfs,
        } => {
            args.pair("-kernel", inherited(kernel));
            args.pair("-initrd", inherited(initramfs));
            args.pair("-append", kernel_command_line(launch, tsc_khz));
        }
        Start::Load { state } => args.pair("-incoming", format!("fd:{state}")),
    }
    args.0
}

/// One socket each for control, agent and console; each takes one client after the other.
fn channels(args: &mut Args, sockets: Sockets) {
    for (name, fd) in [
        ("control", sockets.control),
        ("agent", sockets.agent),
        ("console", sockets.console),
    ] {
        args.pair(
            "-chardev",
            format!("socket,id={name},fd={fd},server=on,wait=off"),
        );
    }
    args.flags("-mon chardev=control,mode=control -serial chardev:console");
    args.json(
        "-device",
        &json!({"driver": "virtio-serial-device", "max_ports": 2}),
    );
    args.json(
        "-device",
        &json!({
            "driver": "virtserialport", "chardev": "agent", "name": AGENT_SERIAL_PORT,
        }),
    );
}

fn disk(args: &mut Args, fd: RawFd) {
    args.pair("-add-fd", format!("fd={fd},set={DISK}"));
    args.json(
        "-blockdev",
        &json!({
            "driver": "raw",
            "node-name": "root",
            "read-only": true,
            "file": {
                "driver": "file",
                "filename": format!("/dev/fdset/{DISK}"),
                "read-only": true,
                "locking": "off",
            },
        }),
    );
    args.json(
        "-device",
        &json!({"driver": "virtio-blk-device", "drive": "root"}),
    );
}

fn network(args: &mut Args, tap: Option<RawFd>) {
    args.pair(
        "-netdev",
        match tap {
            Some(fd) => format!("tap,id=net,fd={fd},vhost=off"),
            None => "hubport,id=net,hubid=0".to_owned(),
        },
    );
    args.json(
        "-device",
        &json!({"driver": "virtio-net-device", "netdev": "net", "mac": MAC}),
    );
}

fn kernel_command_line(launch: &Launch<'_>, tsc_khz: Option<u64>) -> String {
    // A panic resets the machine at once, which ends QEMU: nobody waits for a guest that is gone.
    let mut line = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on 8250.nr_uarts=1 \
                    rcupdate.rcu_expedited=1"
        .to_owned();
    if launch.accel == Accel::Tcg {
        // Emulation does not speculate, so there is nothing to mitigate. Translated code is kept by virtual
        // address: a program that is loaded elsewhere every time is translated every time, which makes
        // starting one four times as slow. Clearing every page that the kernel takes for itself costs a
        // third of the rest.
        line.push_str(" mitigations=off no_timer_check norandmaps init_on_alloc=0");
        if let Some(khz) = tsc_khz {
            // Measured against emulated timers on a busy host, the rate is wrong or not found at all,
            // and then the kernel hangs.
            line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
        }
    }
    if !launch.machine.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&launch.machine.cmdline);
    }
    line
}

fn accel_argument(accel: Accel) -> String {
    match accel {
        Accel::Tcg => format!("tcg,thread=multi,tb-size={TCG_CACHE_MIB}"),
        Accel::Kvm => "kvm".to_owned(),
    }
}

/// What names the process to those who look for it.
pub(super) fn name_argument(id: &str) -> String {
    format!("forkd-{}", id.replace(',', ",,"))
}

/// The name of an inherited file, for those who open it once more.
pub(super) fn inherited(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn pair(&mut self, key: &str, value: impl Into<OsString>) {
        self.0.extend([key.into(), value.into()]);
    }

    /// Fixed words.
    fn flags(&mut self, words: &str) {
        self.0.extend(words.split(' ').map(OsString::from));
    }

    /// JSON, because QEMU's own syntax gives meaning to commas in paths.
    fn json(&mut self, key: &str, value: &serde_json::Value) {
        self.pair(key, value.to_string());
    }
}
