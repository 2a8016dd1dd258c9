//! A 16550 serial port without input, and the sink behind it.

use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use crate::bus::{BusDevice, IrqLine};

/// Most bytes of console output kept in a file. Then it is begun anew: the latest is worth more.
pub const OUTPUT_MAX: u64 = 4 << 20;
/// Output is passed on at the end of a line, or when this much has come without one.
const LINE_MAX: usize = 256;
const CUT: &[u8] = b"[older console output dropped]\n";

/// Where console output goes. Writing never fails as seen by the guest.
#[derive(Debug, Default)]
pub struct Sink {
    file: Option<File>,
    line: Vec<u8>,
    written: u64,
}

impl Sink {
    /// Writes to `file`; with none, output is dropped.
    pub fn new(file: Option<File>) -> Self {
        Self {
            file,
            line: Vec::with_capacity(LINE_MAX),
            written: 0,
        }
    }

    fn pass_on(&mut self) {
        let Some(file) = self.file.as_mut().filter(|file| takes_output(file)) else {
            self.line.clear();
            return;
        };
        if self.written + self.line.len() as u64 > OUTPUT_MAX {
            // A pipe or a terminal cannot be cut, and its reader bounds it.
            if file
                .set_len(0)
                .and_then(|()| file.seek(SeekFrom::Start(0)))
                .is_ok()
            {
                file.write_all(CUT).ok();
            }
            self.written = 0;
        }
        // A full disk or a reader that went away must not stop the guest.
        file.write_all(&self.line).ok();
        self.written += self.line.len() as u64;
        self.line.clear();
    }
}

/// Whether a line can be written without waiting: a pipe that nobody reads would hold up the vCPU, and
/// with it a pause.
fn takes_output(file: &File) -> bool {
    let mut fds = [PollFd::new(file, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    !matches!(poll(&mut fds, Some(&now)), Ok(0))
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_MAX {
                self.pass_on();
            }
        }
        Ok(bytes.len())
    }

    /// The serial port flushes after every byte; lines are passed on whole instead. See
    /// [`Console::flush`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Line(pub(super) Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

/// The serial port.
pub struct Console(pub(super) Serial<Line, NoEvents, Sink>);

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console")
            .field("sink", self.0.writer())
            .finish_non_exhaustive()
    }
}

impl Console {
    /// A port as after power-on.
    pub fn new(sink: Sink, irq: Arc<dyn IrqLine>) -> Self {
        Self(Serial::new(Line(irq), sink))
    }

    pub(super) fn from_state(
        state: &SerialState,
        sink: Sink,
        irq: Arc<dyn IrqLine>,
    ) -> Result<Self, vm_superio::serial::Error<Infallible>> {
        Ok(Self(Serial::from_state(state, Line(irq), NoEvents, sink)?))
    }

    /// Passes on a line that has no end yet. Called when the machine stops.
    pub fn flush(&mut self) {
        self.0.writer_mut().pass_on();
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[value]) = (u8::try_from(offset), data) {
            // Only a full loop-back buffer is reported, and that is the guest's affair.
            self.0.write(offset, value).ok();
        }
    }
}
