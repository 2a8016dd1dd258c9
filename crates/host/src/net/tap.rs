//! Tap devices: a network card's other end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control device cannot be opened.
    #[error(
        "cannot open /dev/net/tun; a container needs that device, and the kernel its tun module"
    )]
    Control(#[source] io::Error),
    /// The device cannot be made.
    #[error("cannot make the tap device {name}; this needs CAP_NET_ADMIN")]
    Make {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Makes a tap device in the network namespace of this thread, or takes hold of one that was [`keep`]t. It carries a virtio header before each frame, and
/// lives as long as the file or a duplicate of it.
pub fn open(name: &str) -> Result<OwnedFd, Error> {
    let control = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(Error::Control)?;
    crate::sys::attach_tap(&control, name).map_err(|source| Error::Make {
        name: name.to_owned(),
        source,
    })?;
    Ok(control.into())
}

/// Whether the device stays when its file is closed.
pub fn keep(tap: &OwnedFd, stays: bool) -> io::Result<()> {
    crate::sys::keep_tap(tap, stays)
}

impl Error {
    /// Whether somebody holds the device.
    pub fn is_in_use(&self) -> bool {
        matches!(self, Self::Make { source, .. } if source.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()))
    }
}
