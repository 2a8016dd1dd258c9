//! Control messages between a controller and the processes of the built-in machine monitor.
//!
//! Transport: an inherited `SOCK_SEQPACKET` socket pair, one message per packet, file descriptors
//! beside it (`SCM_RIGHTS`). Every process has its own pair. A packet is
//!
//! ```text
//!   offset  size  field                       all numbers little-endian
//!        0     1  protocol version, 1
//!        1     1  kind
//!        2     4  sequence number: chosen by the requester, repeated in the answer, 0 in events
//!        6     …  fields of the kind, in the order of the struct
//! ```
//!
//! Strings are a u16 length and UTF-8; lists are a u16 count and their elements. Decoding refuses
//! trailing bytes and never panics. No I/O here: see `forkd-vmm`'s `control` for the sockets.
//!
//! Who speaks to whom:
//!
//! ```text
//!   controller ── Fork, Write, Status, Stop ───────────────────────► template
//!              ◄─ Ready | Failed, Forked, Written, Status, Error ───
//!   controller ── Pause, Resume, Branch, Save, Guest, Status, Stop ► sandbox
//!              ◄─ Running, Paused, Resumed, Branched, Written, Report, Status, Exiting, Error
//! ```

mod codec;

pub use codec::Error;

use codec::{Reader, Writer};

/// The version of the protocol; both ends come from one release, so there is only one.
pub const PROTOCOL_VERSION: u8 = 1;
/// Most bytes in a packet.
pub const PACKET_MAX: usize = 32 * 1024;
/// Most children in one [`Request::Fork`]; a controller sends several for more.
pub const FORK_MAX: usize = 48;
/// Most file descriptors with one packet (the kernel's own limit is 253).
pub const FDS_MAX: usize = 240;
/// Most bytes in a sandbox id.
pub const ID_MAX: usize = 64;

/// Which file descriptors come along for a child, in the order of these bits.
///
/// | bit | descriptor |
/// | --- | --- |
/// | `CONTROL` | the child's end of its control socket pair; always present |
/// | `CGROUP` | directory of the cgroup v2 leaf the child is born into |
/// | `TAP` | the network device's tap |
/// | `VSOCK` | listening stream socket: each connection is one stream to the guest |
/// | `CONSOLE` | where the serial console writes |
/// | `RENDEZVOUS` | listening seqpacket socket: a later controller connects here once the control socket is closed |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FdSet(pub u8);

impl FdSet {
    /// The control socket.
    pub const CONTROL: FdSet = FdSet(1);
    /// The cgroup directory.
    pub const CGROUP: FdSet = FdSet(1 << 1);
    /// The tap device.
    pub const TAP: FdSet = FdSet(1 << 2);
    /// The vsock listener.
    pub const VSOCK: FdSet = FdSet(1 << 3);
    /// The console's sink.
    pub const CONSOLE: FdSet = FdSet(1 << 4);
    /// The listener for a later controller.
    pub const RENDEZVOUS: FdSet = FdSet(1 << 5);
    const ALL: u8 = (1 << 6) - 1;

    /// Whether all of `other` is in this set.
    pub fn has(self, other: FdSet) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set and `other`.
    #[must_use]
    pub fn with(self, other: FdSet) -> FdSet {
        FdSet(self.0 | other.0)
    }

    /// How many descriptors travel.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    fn valid(self) -> bool {
        self.0 & !FdSet::ALL == 0 && self.has(FdSet::CONTROL)
    }
}

/// One child of a [`Request::Fork`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// The sandbox id, 1..=[`ID_MAX`] bytes; names the process.
    pub id: String,
    /// User and group to become; `None` keeps the template's.
    pub user: Option<(u32, u32)>,
    /// Wait for [`Request::Resume`] before the guest's first instruction.
    pub paused: bool,
    /// Descriptors that come along.
    pub fds: FdSet,
}

/// What a controller asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// To a template: fork these children. Descriptors: those of the children, in order.
    Fork {
        /// 1..=[`FORK_MAX`] children.
        children: Vec<Child>,
    },
    /// To a template born of a branch: write its snapshot. Descriptors: memory file, layer index
    /// file, state file (all empty, writable), and optionally `/proc/PID/pagemap` of the template.
    Write,
    /// To a sandbox: stop the vCPUs at a known point.
    Pause,
    /// To a sandbox: go on.
    Resume,
    /// To a sandbox: freeze a copy as a template and go on. Descriptors: the new template's control
    /// socket, and optionally its rendezvous listener.
    Branch {
        /// Stay paused afterwards.
        stay_paused: bool,
    },
    /// To a sandbox: write its whole memory and state while it is paused. Descriptors as `Write`.
    Save,
    /// To any: how are you?
    Status,
    /// To any: end the process. A template's children go on.
    Stop,
    /// To a sandbox that runs the built-in test guest: one command (see the monitor's `guest`).
    Guest {
        /// The command's number.
        op: u32,
        /// Its arguments.
        args: [u32; 3],
    },
}

/// Why a child could not be forked, or a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The errno, 0 where there is none.
    pub errno: u32,
    /// The step and the reason, for people.
    pub message: String,
}

/// Where the time of a start went, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stages {
    /// From the arrival of the request in the template to the child's first instruction.
    pub clone_ns: u32,
    /// KVM_CREATE_VM.
    pub vm_ns: u32,
    /// Memory slots.
    pub memory_ns: u32,
    /// Interrupt chip.
    pub irqchip_ns: u32,
    /// Creating the vCPUs.
    pub vcpu_ns: u32,
    /// Restoring vCPU, interrupt chip, clock and device state.
    pub state_ns: u32,
    /// Dropping privileges, starting threads, seccomp, up to the first entry.
    pub enter_ns: u32,
}

/// What a template or sandbox is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A template whose snapshot is on disk.
    Ready,
    /// A template whose snapshot is being written.
    Writing,
    /// A template whose snapshot exists in memory only.
    Memory,
    /// A sandbox that runs.
    Running,
    /// A sandbox that is paused.
    Paused,
}

/// Why a sandbox ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest crashed its CPU (triple fault).
    Crash,
    /// The monitor cannot go on; a message says why.
    Internal,
    /// The controller asked for it.
    Stopped,
}

/// What a process of the monitor says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Event: a template is loaded and can be forked.
    Ready {
        /// Guest memory.
        memory_mib: u32,
        /// vCPUs.
        vcpus: u32,
        /// How long loading took, microseconds.
        load_us: u32,
        /// Whether children may be given a user and a cgroup. False in a template born of a confined
        /// sandbox: its children keep that sandbox's user, and the controller moves them.
        privileged: bool,
    },
    /// Event: the process cannot start and ends.
    Failed(Failure),
    /// Answer to `Fork`, one entry per child: its pid or why not. Descriptors: one pidfd for each
    /// child that was forked, in order. The child itself says `Running`, or `Failed`.
    Forked(Vec<Result<u32, Failure>>),
    /// Event of a new sandbox: it is about to enter the guest (or waits, when forked paused).
    Running(Stages),
    /// Answer to `Pause`.
    Paused {
        /// From the request to the last vCPU at rest, microseconds.
        pause_us: u32,
    },
    /// Answer to `Resume`.
    Resumed,
    /// Answer to `Branch`. Descriptor: the new template's pidfd.
    Branched {
        /// The new template.
        pid: u32,
        /// From the request to the guest going on, microseconds.
        pause_us: u32,
        /// Of that: until all vCPUs stood still.
        quiesce_us: u32,
        /// Of that: reading out the state.
        state_us: u32,
        /// Of that: the fork itself.
        fork_us: u32,
        /// The snapshot that the written layer will be relative to; empty for none, which means that
        /// all of memory is written.
        base: String,
    },
    /// Answer to `Write` and `Save`: the files are complete and synced.
    Written {
        /// Bytes of memory pages in the memory file.
        data_bytes: u64,
        /// Bytes of memory that are now zero and were not.
        zero_bytes: u64,
        /// Extents in the index.
        extents: u32,
        /// blake3 of the state file.
        state_hash: [u8; 32],
        /// How long it took, milliseconds.
        took_ms: u32,
    },
    /// Answer to `Status`.
    Status {
        /// What it is doing.
        state: State,
        /// Children forked (template) or branches made (sandbox) so far.
        forks: u64,
        /// Why the last `Write` failed; empty if it did not.
        write_error: String,
    },
    /// Event: the test guest reports a value.
    Report(u64),
    /// Event: the sandbox ends.
    Exiting {
        /// Why.
        exit: Exit,
        /// For people; may be empty.
        message: String,
    },
    /// The request with this sequence number was refused or failed.
    Error(Failure),
}

const FORK: u8 = 1;
const WRITE: u8 = 2;
const PAUSE: u8 = 3;
const RESUME: u8 = 4;
const BRANCH: u8 = 5;
const SAVE: u8 = 6;
const STATUS: u8 = 7;
const STOP: u8 = 8;
const GUEST: u8 = 9;

impl Request {
    /// The packet for this request.
    pub fn encode(&self, seq: u32) -> Vec<u8> {
        let mut w = Writer::new(PROTOCOL_VERSION);
        match self {
            Request::Fork { children } => {
                w.start(FORK, seq).u16(children.len() as u16);
                for child in children {
                    w.str(&child.id).u8(child.fds.0).bool(child.paused);
                    let (uid, gid) = child.user.unwrap_or_default();
                    w.bool(child.user.is_some()).u32(uid).u32(gid);
                }
            }
            Request::Write => _ = w.start(WRITE, seq),
            Request::Pause => _ = w.start(PAUSE, seq),
            Request::Resume => _ = w.start(RESUME, seq),
            Request::Branch { stay_paused } => _ = w.start(BRANCH, seq).bool(*stay_paused),
            Request::Save => _ = w.start(SAVE, seq),
            Request::Status => _ = w.start(STATUS, seq),
            Request::Stop => _ = w.start(STOP, seq),
            Request::Guest { op, args } => {
                w.start(GUEST, seq)
                    .u32(*op)
                    .u32(args[0])
                    .u32(args[1])
                    .u32(args[2]);
            }
        }
        w.finish()
    }

    /// Reads a packet: the sequence number and the request.
    pub fn decode(packet: &[u8]) -> Result<(u32, Request), Error> {
        let (mut r, kind, seq) = Reader::start(packet, PROTOCOL_VERSION)?;
        let request = match kind {
            FORK => Request::Fork {
                children: decode_children(&mut r)?,
            },
            WRITE => Request::Write,
            PAUSE => Request::Pause,
            RESUME => Request::Resume,
            BRANCH => Request::Branch {
                stay_paused: r.bool()?,
            },
            SAVE => Request::Save,
            STATUS => Request::Status,
            STOP => Request::Stop,
            GUEST => Request::Guest {
                op: r.u32()?,
                args: [r.u32()?, r.u32()?, r.u32()?],
            },
            other => return Err(Error::Kind(other)),
        };
        r.finish()?;
        Ok((seq, request))
    }
}

fn decode_children(r: &mut Reader<'_>) -> Result<Vec<Child>, Error> {
    let count = usize::from(r.u16()?);
    if count == 0 || count > FORK_MAX {
        return Err(Error::Value {
            field: "children",
            value: count as u64,
        });
    }
    let mut children = Vec::with_capacity(count);
    let mut fds_total = 0;
    for _ in 0..count {
        let id = r.str()?;
        if id.is_empty() || id.len() > ID_MAX {
            return Err(Error::Value {
                field: "id length",
                value: id.len() as u64,
            });
        }
        let fds = FdSet(r.u8()?);
        if !fds.valid() {
            return Err(Error::Value {
                field: "fds",
                value: u64::from(fds.0),
            });
        }
        fds_total += fds.count();
        let paused = r.bool()?;
        let has_user = r.bool()?;
        let user = (r.u32()?, r.u32()?);
        children.push(Child {
            id,
            user: has_user.then_some(user),
            paused,
            fds,
        });
    }
    if fds_total > FDS_MAX {
        return Err(Error::Value {
            field: "descriptors",
            value: fds_total as u64,
        });
    }
    Ok(children)
}

const READY: u8 = 128;
const FAILED: u8 = 129;
const FORKED: u8 = 130;
const RUNNING: u8 = 131;
const PAUSED: u8 = 132;
const RESUMED: u8 = 133;
const BRANCHED: u8 = 134;
const WRITTEN: u8 = 135;
const STATUS_IS: u8 = 136;
const REPORT: u8 = 137;
const EXITING: u8 = 138;
const ERROR: u8 = 139;

impl Reply {
    /// The packet for this reply; `seq` is the request's, 0 for events.
    pub fn encode(&self, seq: u32) -> Vec<u8> {
        let mut w = Writer::new(PROTOCOL_VERSION);
        match self {
            Reply::Ready {
                memory_mib,
                vcpus,
                load_us,
                privileged,
            } => {
                w.start(READY, seq)
                    .u32(*memory_mib)
                    .u32(*vcpus)
                    .u32(*load_us)
                    .bool(*privileged);
            }
            Reply::Failed(failure) => _ = w.start(FAILED, seq).failure(failure),
            Reply::Forked(children) => {
                w.start(FORKED, seq).u16(children.len() as u16);
                for child in children {
                    match child {
                        Ok(pid) => _ = w.bool(true).u32(*pid),
                        Err(failure) => _ = w.bool(false).failure(failure),
                    }
                }
            }
            Reply::Running(stages) => {
                w.start(RUNNING, seq);
                stages.fields().iter().for_each(|ns| _ = w.u32(*ns));
            }
            Reply::Paused { pause_us } => _ = w.start(PAUSED, seq).u32(*pause_us),
            Reply::Resumed => _ = w.start(RESUMED, seq),
            Reply::Branched { .. } | Reply::Written { .. } => self.encode_report(seq, &mut w),
            Reply::Status {
                state,
                forks,
                write_error,
            } => {
                w.start(STATUS_IS, seq)
                    .u8(*state as u8)
                    .u64(*forks)
                    .str(write_error);
            }
            Reply::Report(value) => _ = w.start(REPORT, seq).u64(*value),
            Reply::Exiting { exit, message } => {
                w.start(EXITING, seq).u8(*exit as u8).str(message);
            }
            Reply::Error(failure) => _ = w.start(ERROR, seq).failure(failure),
        }
        w.finish()
    }

    /// What a branch or a write came to.
    fn encode_report(&self, seq: u32, w: &mut Writer) {
        match self {
            Reply::Branched {
                pid,
                pause_us,
                quiesce_us,
                state_us,
                fork_us,
                base,
            } => {
                w.start(BRANCHED, seq)
                    .u32(*pid)
                    .u32(*pause_us)
                    .u32(*quiesce_us);
                w.u32(*state_us).u32(*fork_us).str(base);
            }
            Reply::Written {
                data_bytes,
                zero_bytes,
                extents,
                state_hash,
                took_ms,
            } => {
                w.start(WRITTEN, seq)
                    .u64(*data_bytes)
                    .u64(*zero_bytes)
                    .u32(*extents);
                w.bytes(state_hash).u32(*took_ms);
            }
            _ => {}
        }
    }

    /// Reads a packet: the sequence number and the reply.
    pub fn decode(packet: &[u8]) -> Result<(u32, Reply), Error> {
        let (mut r, kind, seq) = Reader::start(packet, PROTOCOL_VERSION)?;
        let reply = match kind {
            READY => Reply::Ready {
                memory_mib: r.u32()?,
                vcpus: r.u32()?,
                load_us: r.u32()?,
                privileged: r.bool()?,
            },
            FAILED => Reply::Failed(r.failure()?),
            FORKED => Reply::Forked(decode_forked(&mut r)?),
            RUNNING => Reply::Running(Stages::read(&mut r)?),
            PAUSED => Reply::Paused { pause_us: r.u32()? },
            RESUMED => Reply::Resumed,
            BRANCHED => Reply::Branched {
                pid: r.u32()?,
                pause_us: r.u32()?,
                quiesce_us: r.u32()?,
                state_us: r.u32()?,
                fork_us: r.u32()?,
                base: r.str()?,
            },
            WRITTEN => Reply::Written {
                data_bytes: r.u64()?,
                zero_bytes: r.u64()?,
                extents: r.u32()?,
                state_hash: r.array()?,
                took_ms: r.u32()?,
            },
            STATUS_IS => Reply::Status {
                state: decode_state(r.u8()?)?,
                forks: r.u64()?,
                write_error: r.str()?,
            },
            REPORT => Reply::Report(r.u64()?),
            EXITING => Reply::Exiting {
                exit: decode_exit(r.u8()?)?,
                message: r.str()?,
            },
            ERROR => Reply::Error(r.failure()?),
            other => return Err(Error::Kind(other)),
        };
        r.finish()?;
        Ok((seq, reply))
    }
}

fn decode_forked(r: &mut Reader<'_>) -> Result<Vec<Result<u32, Failure>>, Error> {
    let count = usize::from(r.u16()?);
    if count > FORK_MAX {
        return Err(Error::Value {
            field: "children",
            value: count as u64,
        });
    }
    (0..count)
        .map(|_| {
            if r.bool()? {
                Ok(Ok(r.u32()?))
            } else {
                Ok(Err(r.failure()?))
            }
        })
        .collect()
}

fn decode_state(value: u8) -> Result<State, Error> {
    use State::{Memory, Paused, Ready, Running, Writing};
    let known = [Ready, Writing, Memory, Running, Paused];
    let found = known.into_iter().find(|state| *state as u8 == value);
    found.ok_or_else(|| Error::Value {
        field: "state",
        value: u64::from(value),
    })
}

fn decode_exit(value: u8) -> Result<Exit, Error> {
    use Exit::{Crash, Internal, PowerOff, Reset, Stopped};
    let known = [PowerOff, Reset, Crash, Internal, Stopped];
    let found = known.into_iter().find(|exit| *exit as u8 == value);
    found.ok_or_else(|| Error::Value {
        field: "exit",
        value: u64::from(value),
    })
}

impl Stages {
    fn fields(&self) -> [u32; 7] {
        let Stages {
            clone_ns,
            vm_ns,
            memory_ns,
            irqchip_ns,
            vcpu_ns,
            state_ns,
            enter_ns,
        } = *self;
        [
            clone_ns, vm_ns, memory_ns, irqchip_ns, vcpu_ns, state_ns, enter_ns,
        ]
    }

    fn read(r: &mut Reader<'_>) -> Result<Stages, Error> {
        Ok(Stages {
            clone_ns: r.u32()?,
            vm_ns: r.u32()?,
            memory_ns: r.u32()?,
            irqchip_ns: r.u32()?,
            vcpu_ns: r.u32()?,
            state_ns: r.u32()?,
            enter_ns: r.u32()?,
        })
    }
}

#[cfg(test)]
mod tests;
