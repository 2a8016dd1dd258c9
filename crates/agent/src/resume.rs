//! Makes a fork an individual: entropy, clock, names, address, environment, generators.
//!
//! Every step must succeed, or the call fails and the sandbox does not become ready: two forks that
//! draw the same random numbers are worse than one fork less.

use std::io;
use std::time::Instant;

use forkd_wire::agent::connect::Code;
use forkd_wire::agent::{ResumeRequest, ResumeResponse};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::agent::{Agent, Place};
use crate::rpc::Fault;
use crate::sys;

mod network;

const NANOS: u64 = 1_000_000_000;
const MACHINE_ID: &str = "/etc/machine-id";
const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";

/// `Resume`.
pub(crate) async fn apply(agent: &Agent, request: ResumeRequest) -> Result<ResumeResponse, Fault> {
    let started = Instant::now();
    check(&request)?;
    let entropy = request.entropy_bytes().map_err(Fault::invalid)?;
    if agent.place == Place::Guest {
        let step = |what: &str, result: io::Result<()>| {
            result.map_err(|error| {
                Fault::new(Code::Internal, format!("resume cannot {what}: {error}"))
            })
        };
        step("reseed the kernel's generator", sys::add_entropy(&entropy))?;
        step("set the clock", set_clock(request.wall_clock_ns))?;
        step("set the hostname", set_hostname(&request.hostname))?;
        step(
            "write the machine id",
            write_line(MACHINE_ID, &request.machine_id),
        )?;
        if let Some(network) = &request.network {
            network::apply(&agent.network, network)
                .map_err(|error| Fault::new(Code::Internal, format!("resume: {error}")))?;
        }
    }
    agent.extend_env(request.env.clone());
    // Last, because the interpreter draws its seeds from the kernel's generator.
    let reseeded = agent.python.reseed(&request.env).await?;
    Ok(ResumeResponse {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        applied_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
        reseeded,
    })
}

fn check(request: &ResumeRequest) -> Result<(), Fault> {
    let name = &request.hostname;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(Fault::invalid(format!("{name:?} is no hostname")));
    }
    let id = &request.machine_id;
    if id.len() != 32
        || !id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err(Fault::invalid(format!(
            "{id:?} is no machine id; 32 lower-case hex digits are"
        )));
    }
    let bad = |(name, value): (&String, &String)| {
        name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
    };
    match request.env.iter().find(|pair| bad(*pair)) {
        Some((name, _)) => Err(Fault::invalid(format!(
            "{name:?} cannot be in an environment"
        ))),
        None => Ok(()),
    }
}

fn set_clock(wall_clock_ns: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let time = Timespec {
        tv_sec: (wall_clock_ns / NANOS).try_into().map_err(invalid)?,
        tv_nsec: (wall_clock_ns % NANOS).try_into().map_err(invalid)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

fn set_hostname(name: &str) -> io::Result<()> {
    rustix::system::sethostname(name.as_bytes())?;
    write_line(HOSTNAME, name)?;
    let hosts = format!("127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback");
    write_line(HOSTS, &hosts)
}

fn write_line(path: &str, line: &str) -> io::Result<()> {
    std::fs::create_dir_all("/etc")?;
    std::fs::write(path, format!("{line}\n"))
}
