//! The guest's name server: forwards what its policy lets it ask, and tells the rules what the answers were.
//!
//! Rules about domains are kept here and by address. The addresses a name has are let through for as long as the
//! answer holds, and are so before the guest reads it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::host::Ways;
use crate::policy::Policy;
use crate::rules::{self, Verdict};
use crate::slot::NameSockets;

mod message;

#[cfg(test)]
mod tests;

use message::Question;

/// Questions of one guest at once. More wait in the socket, and beyond that are lost, as on any network.
const AT_ONCE: usize = 64;
/// How long a server upstream may take before the next one is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest may keep a connection that it says nothing on.
const IDLE: Duration = Duration::from_secs(10);
/// The longest message over UDP that is forwarded; RFC 6891 §6.2.5.
const UDP_MAX: usize = 4096;

/// Takes rules into force in the guest's slot. Blocks.
pub type Enforce = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What the name server of one guest works by.
#[derive(Clone)]
pub struct Names {
    policy: Arc<Mutex<Policy>>,
    refused: Arc<[IpNet]>,
    upstream: Arc<[SocketAddr]>,
    enforce: Enforce,
    ways: Ways,
    room: Arc<Semaphore>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Names")
            .field("policy", &self.policy)
            .field("upstream", &self.upstream)
            .finish_non_exhaustive()
    }
}

/// The servers named in the text of a resolv.conf(5).
pub fn servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let words = resolv_conf.lines().map(|line| line.split_whitespace());
    words
        .filter_map(|mut words| match (words.next(), words.next()) {
            (Some("nameserver"), Some(address)) => address.parse::<IpAddr>().ok(),
            _ => None,
        })
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

impl Names {
    /// A name server that forwards to `upstream`, in order, for a guest that has these ways out.
    pub fn new(
        ways: Ways,
        policy: Policy,
        refused: &[IpNet],
        upstream: &[SocketAddr],
        enforce: Enforce,
    ) -> Self {
        Self {
            policy: Arc::new(Mutex::new(policy)),
            refused: refused.into(),
            upstream: upstream.into(),
            enforce,
            ways,
            room: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// From now on this policy counts.
    pub fn set_policy(&self, policy: Policy) {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Answers until it is dropped, or a socket fails.
    pub async fn serve(self, sockets: NameSockets) -> io::Result<()> {
        let udp = Arc::new(UdpSocket::from_std(sockets.udp)?);
        let tcp = TcpListener::from_std(sockets.tcp)?;
        tokio::try_join!(self.serve_udp(udp), self.serve_tcp(tcp))?;
        Ok(())
    }

    async fn serve_udp(&self, socket: Arc<UdpSocket>) -> io::Result<()> {
        let mut tasks = tokio::task::JoinSet::new();
        let mut buffer = vec![0; UDP_MAX];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await?;
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else {
                return Ok(());
            };
            let (names, socket, query) =
                (self.clone(), Arc::clone(&socket), buffer[..length].to_vec());
            while tasks.try_join_next().is_some() {}
            tasks.spawn(async move {
                if let Some(answer) = names.answer(&query, Transport::Udp).await {
                    // A guest that does not wait for its answer has given up on it.
                    let _ = socket.send_to(&answer, from).await;
                }
                drop(permit);
            });
        }
    }

    async fn serve_tcp(&self, listener: TcpListener) -> io::Result<()> {
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else {
                return Ok(());
            };
            let (stream, _) = listener.accept().await?;
            let names = self.clone();
            while tasks.try_join_next().is_some() {}
            tasks.spawn(async move {
                // A guest that breaks off has only itself to ask.
                let _ = names.converse(stream).await;
                drop(permit);
            });
        }
    }

    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let query = tokio::time::timeout(IDLE, read_framed(&mut stream)).await??;
            match self.answer(&query, Transport::Tcp).await {
                Some(answer) => write_framed(&mut stream, &answer).await?,
                None => return Ok(()),
            }
        }
    }

    /// The answer to a query; `None` when it is not to be answered.
    async fn answer(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let question = Question::read(query)?;
        let policy = self
            .policy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let may = policy.may_look_up(&question.name);
        let verdicts = verdicts(&policy, &question.name);
        // Also what may not be asked is looked up where its addresses are denied: a guest may know them already.
        if !may && verdicts.is_empty() {
            return Some(question.refusal());
        }
        let Some(answer) = self.forward(query, transport).await else {
            return Some(question.failure());
        };
        if !self.enforce(&question, &answer, verdicts).await {
            return Some(question.failure());
        }
        Some(if may { answer } else { question.refusal() })
    }

    /// Whether all that follows from an answer is in force.
    async fn enforce(
        &self,
        question: &Question,
        answer: &[u8],
        verdicts: Vec<(Verdict, Option<u16>)>,
    ) -> bool {
        if verdicts.is_empty() {
            return true;
        }
        let (addresses, seconds) = question.addresses(answer);
        let reached = |a: &&IpAddr| a.is_ipv4() || self.ways.v6;
        let public = |a: IpAddr| rules::is_public(a, &self.refused);
        let mut text = String::new();
        for (verdict, port) in verdicts {
            let meant = addresses.iter().filter(reached);
            let meant = meant.filter(|a| verdict == Verdict::Deny || public(**a));
            let meant: Vec<IpAddr> = meant.copied().collect();
            text.push_str(&rules::resolved(verdict, &meant, port, seconds));
        }
        if text.is_empty() {
            return true;
        }
        let enforce = Arc::clone(&self.enforce);
        let done = tokio::task::spawn_blocking(move || enforce(&text)).await;
        match done {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!(
                    name = question.name,
                    error,
                    "rules for a name are not in force"
                );
                false
            }
            Err(_) => false,
        }
    }

    async fn forward(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        for server in self.upstream.iter() {
            let asked = async {
                match transport {
                    Transport::Udp => ask_udp(*server, query).await,
                    Transport::Tcp => ask_tcp(*server, query).await,
                }
            };
            if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, asked).await {
                return Some(answer);
            }
        }
        None
    }
}

#[derive(Debug, Clone, Copy)]
enum Transport {
    Udp,
    Tcp,
}

/// What a policy's rules about a name say of its addresses.
fn verdicts(policy: &Policy, name: &str) -> Vec<(Verdict, Option<u16>)> {
    let named = |rules: &[crate::policy::Rule], verdict| {
        let rules = rules.iter().filter(|rule| rule.target.names(name));
        rules.map(|rule| (verdict, rule.port)).collect::<Vec<_>>()
    };
    let mut verdicts = named(policy.allow(), Verdict::Allow);
    verdicts.extend(named(policy.deny(), Verdict::Deny));
    verdicts
}

/// Asks from a port of its own each time, so that nobody can guess where the answer is awaited.
async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; UDP_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // The two bytes that tie an answer to its question; RFC 1035 §4.1.1.
        if buffer[..length].get(..2) == query.get(..2) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_framed(&mut stream, query).await?;
    read_framed(&mut stream).await
}

/// A message over TCP is preceded by its length; RFC 1035 §4.2.2.
async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.write_all(&bytes).await
}
