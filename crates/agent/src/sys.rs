//! System calls that no crate wraps: entropy, network devices, a new terminal's session, vsock.
#![allow(
    unsafe_code,
    reason = "the agent's only file that calls into the C library"
)]

use std::ffi::{c_int, c_ulong};
use std::io;
use std::mem::size_of;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `_IOW('R', 0x03, int[2])`, linux/random.h.
const RNDADDENTROPY: c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`, linux/random.h.
const RNDRESEEDCRNG: c_ulong = 0x5207;
/// The most entropy taken at once, bytes.
const MAX_ENTROPY: usize = 512;

#[repr(C)]
struct PoolInfo {
    entropy_bits: c_int,
    size: c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// Mixes `bytes` into the kernel's generator, credits them, and makes it reseed at once.
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    let device = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")?;
    let mut info = PoolInfo {
        entropy_bits: 0,
        size: 0,
        bytes: [0; MAX_ENTROPY],
    };
    let bytes = &bytes[..bytes.len().min(MAX_ENTROPY)];
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    // At most MAX_ENTROPY, so both fit.
    info.size = bytes.len() as c_int;
    info.entropy_bits = info.size * 8;
    // SAFETY: RNDADDENTROPY reads two ints and then `size` bytes, all inside `info`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const info) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) })?;
    Ok(())
}

/// Makes the child the leader of a new session with its standard input as the terminal.
pub(crate) fn own_terminal(command: &mut Command) {
    let take = || {
        // SAFETY: setsid has no memory effects; async-signal-safe.
        check(unsafe { libc::setsid() })?;
        // SAFETY: TIOCSCTTY takes an int by value; async-signal-safe.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) })?;
        Ok(())
    };
    // SAFETY: the closure calls only async-signal-safe functions and does not allocate.
    unsafe { command.pre_exec(take) };
}

/// A listening vsock socket on `port`, for any peer. Fails where the guest has no vsock.
pub(crate) fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain call; a non-negative result is a descriptor that is ours.
    let fd = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?) };
    // SAFETY: sockaddr_vm is plain data, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is valid for `size` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: plain call on a descriptor that is ours.
    check(unsafe { libc::listen(fd.as_raw_fd(), 64) })?;
    Ok(fd)
}

fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    if interface.is_empty() || interface.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn control(request: c_ulong, argument: &mut libc::ifreq) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let socket: OwnedFd = match socket {
        Ok(socket) => socket.into(),
        Err(error) => return Err(error),
    };
    // SAFETY: every request used here reads or writes one ifreq.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            request as _,
            std::ptr::from_mut(argument),
        )
    })?;
    Ok(())
}

fn address_of(ip: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr is plain data, for which zero is valid.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::AF_INET as libc::sa_family_t;
    // sockaddr_in: two bytes of port, then the address.
    for (to, from) in address.sa_data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    address
}

/// Switches a network device on or off.
pub(crate) fn set_link(interface: &str, up: bool) -> io::Result<()> {
    let mut request = request_for(interface)?;
    control(libc::SIOCGIFFLAGS as c_ulong, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    control(libc::SIOCSIFFLAGS as c_ulong, &mut request)
}

/// Gives a network device its MAC address; it must be off.
pub(crate) fn set_mac(interface: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = request_for(interface)?;
    // SAFETY: sockaddr is plain data, for which zero is valid.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    control(libc::SIOCSIFHWADDR as c_ulong, &mut request)
}

/// Gives a network device its IPv4 address, in place of the one it had.
pub(crate) fn set_address(interface: &str, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_addr = address_of(ip);
    control(libc::SIOCSIFADDR as c_ulong, &mut request)?;
    let mask = u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0);
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_netmask = address_of(Ipv4Addr::from_bits(mask));
    control(libc::SIOCSIFNETMASK as c_ulong, &mut request)
}

/// Adds the default route. One that is there already stays.
pub(crate) fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: rtentry is plain data, for which zero is valid.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address_of(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address_of(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address_of(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    let socket = OwnedFd::from(std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?);
    let at = &raw const route;
    // SAFETY: SIOCADDRT reads one rtentry.
    match check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, at) }) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Gives a network device an IPv6 address besides those it has.
pub(crate) fn add_address6(interface: &str, ip: Ipv6Addr, prefix: u8) -> io::Result<()> {
    let request = libc::in6_ifreq {
        ifr6_addr: address6_of(ip),
        ifr6_prefixlen: u32::from(prefix),
        ifr6_ifindex: index_of(interface)?,
    };
    // SAFETY: on a socket of version 6, SIOCSIFADDR reads one in6_ifreq.
    unless_there(unsafe { control6(libc::SIOCSIFADDR as c_ulong, &raw const request) })
}

/// `struct in6_rtmsg`; linux/ipv6_route.h.
#[repr(C)]
struct Route6 {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    /// Of the prefixes of destination and source.
    lengths: [u16; 2],
    metric: u32,
    info: c_ulong,
    flags: u32,
    interface: c_int,
}

/// Adds the default route of IPv6 through a network device. One that is there already stays.
pub(crate) fn add_default_route6(interface: &str, gateway: Ipv6Addr) -> io::Result<()> {
    let route = Route6 {
        destination: [0; 16],
        source: [0; 16],
        gateway: gateway.octets(),
        kind: 0,
        lengths: [0; 2],
        // What the kernel gives to routes of nobody's choice.
        metric: 1024,
        info: 0,
        flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
        interface: index_of(interface)?,
    };
    // SAFETY: on a socket of version 6, SIOCADDRT reads one in6_rtmsg.
    unless_there(unsafe { control6(libc::SIOCADDRT as c_ulong, &raw const route) })
}

/// # Safety
/// The request must read no more than what `argument` points to, and write nothing.
unsafe fn control6<T>(request: c_ulong, argument: *const T) -> io::Result<()> {
    let socket = OwnedFd::from(std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?);
    // SAFETY: as the caller promises.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request as _, argument) }).map(drop)
}

fn unless_there(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

fn address6_of(ip: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr {
        s6_addr: ip.octets(),
    }
}

fn index_of(interface: &str) -> io::Result<c_int> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name is a C string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => c_int::try_from(index).map_err(io::Error::other),
    }
}

/// Sends any signal, also a real-time one.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain call.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Lets the event loop wait for a descriptor.
pub(crate) fn async_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}
