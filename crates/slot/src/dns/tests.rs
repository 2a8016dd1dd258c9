//! Tests of the name server, against servers upstream on loopback.

use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::*;
use crate::policy::Mode;

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// Answers every question with an alias and these addresses.
fn reply(query: &[u8], addresses: &[IpAddr]) -> Vec<u8> {
    let mut message = Message::from_vec(query).unwrap();
    message.metadata.message_type = MessageType::Response;
    let name = message.queries[0].name.clone();
    let real = Name::from_ascii("cdn.example.net.").unwrap();
    message.add_answer(Record::from_rdata(
        name,
        300,
        RData::CNAME(CNAME(real.clone())),
    ));
    for address in addresses {
        let data = match address {
            IpAddr::V4(address) => RData::A(A(*address)),
            IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
        };
        message.add_answer(Record::from_rdata(real.clone(), 30, data));
    }
    message.to_vec().unwrap()
}

/// A server upstream, over both transports.
async fn upstream(addresses: &'static [IpAddr]) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(to).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            // An answer that somebody guessed at comes first.
            let mut forged = reply(&buffer[..length], &[IpAddr::V4(Ipv4Addr::new(6, 6, 6, 6))]);
            forged[0] ^= 1;
            udp.send_to(&forged, from).await.unwrap();
            udp.send_to(&reply(&buffer[..length], addresses), from)
                .await
                .unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let query = read_framed(&mut stream).await.unwrap();
            write_framed(&mut stream, &reply(&query, addresses))
                .await
                .unwrap();
        }
    });
    to
}

struct World {
    server: SocketAddr,
    names: Names,
    enforced: Arc<Mutex<Vec<String>>>,
    broken: Arc<AtomicBool>,
}

impl World {
    async fn new(allow: &[&str], deny: &[&str], addresses: &'static [IpAddr]) -> Self {
        Self::with(Ways { v6: true }, allow, deny, addresses).await
    }

    async fn with(ways: Ways, allow: &[&str], deny: &[&str], addresses: &'static [IpAddr]) -> Self {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let policy = Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap();
        let (enforced, broken) = (
            Arc::new(Mutex::new(Vec::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let (log, fails) = (Arc::clone(&enforced), Arc::clone(&broken));
        let enforce: Enforce = Arc::new(move |rules| {
            log.lock().unwrap().push(rules.to_owned());
            match fails.load(Ordering::Relaxed) {
                true => Err("no".to_owned()),
                false => Ok(()),
            }
        });
        // The first server is dead, as happens.
        let dead = std::net::UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let names = Names::new(
            ways,
            policy,
            &[],
            &[dead, upstream(addresses).await],
            enforce,
        );
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = tcp.local_addr().unwrap();
        let udp = std::net::UdpSocket::bind(server).unwrap();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        tokio::spawn(names.clone().serve(NameSockets { udp, tcp }));
        Self {
            server,
            names,
            enforced,
            broken,
        }
    }

    async fn ask(&self, name: &str) -> Message {
        let answer = ask_udp(self.server, &query(7, name)).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }

    fn enforced(&self) -> Vec<String> {
        std::mem::take(&mut self.enforced.lock().unwrap())
    }
}

const PUBLIC: &[IpAddr] = &[IpAddr::V4(Ipv4Addr::new(93, 184, 215, 14))];

#[tokio::test]
async fn forwards_and_touches_no_rules_where_none_is_about_the_name() {
    let world = World::new(&[], &[], PUBLIC).await;
    let answer = world.ask("www.example.com.").await;
    assert_eq!(answer.metadata.id, 7);
    assert_eq!(answer.answers.len(), 2);
    assert!(
        !answer
            .answers
            .iter()
            .any(|r| r.data == RData::A(A(Ipv4Addr::new(6, 6, 6, 6))))
    );
    let over_tcp = ask_tcp(world.server, &query(9, "www.example.com."))
        .await
        .unwrap();
    assert_eq!(Message::from_vec(&over_tcp).unwrap().answers.len(), 2);
    assert!(world.enforced().is_empty());
}

#[tokio::test]
async fn only_the_list_is_looked_up_and_let_through_first() {
    let world = World::new(&["*.example.com:443"], &["all"], PUBLIC).await;
    let refused = world.ask("secret.evil.net.").await;
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    assert!(refused.answers.is_empty() && world.enforced().is_empty());

    assert_eq!(world.ask("WWW.example.com.").await.answers.len(), 2);
    let enforced = world.enforced();
    // The shorter of the two times, 30, and the grace.
    assert!(
        enforced[0].contains("allowed_ports { 93.184.215.14 . 443 timeout 90s }"),
        "{enforced:?}"
    );

    world.broken.store(true, Ordering::Relaxed);
    let failed = world.ask("www.example.com.").await;
    assert_eq!(failed.metadata.response_code, ResponseCode::ServFail);
    assert!(failed.answers.is_empty());
}

#[tokio::test]
async fn a_name_does_not_lead_into_private_networks() {
    const INSIDE: &[IpAddr] = &[
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5)),
        IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
        // Unique local; 10.0.0.5 mapped, by 6to4 and by NAT64.
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5)),
        IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0xa00, 5)),
        IpAddr::V6(Ipv6Addr::new(0x2002, 0xa00, 5, 0, 0, 0, 0, 1)),
        IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa00, 5)),
    ];
    let world = World::new(&["rebound.example.com"], &[], INSIDE).await;
    assert_eq!(world.ask("rebound.example.com.").await.answers.len(), 7);
    assert_eq!(world.enforced(), Vec::<String>::new());
}

#[tokio::test]
async fn addresses_of_both_families_are_let_through_where_the_guest_has_both() {
    const BOTH: &[IpAddr] = &[
        IpAddr::V4(Ipv4Addr::new(93, 184, 215, 14)),
        IpAddr::V6(Ipv6Addr::new(0x2606, 0x2800, 0, 0, 0, 0, 0, 1)),
    ];
    for v6 in [true, false] {
        let world = World::with(Ways { v6 }, &["example.com:443"], &["all"], BOTH).await;
        assert_eq!(world.ask("example.com.").await.answers.len(), 3);
        let enforced = world.enforced().concat();
        assert!(enforced.contains("inet forkd allowed_ports { 93.184.215.14 . 443"));
        assert_eq!(
            enforced.contains("inet forkd allowed6_ports { 2606:2800::1 . 443 timeout 90s }"),
            v6,
            "{enforced}"
        );
    }
}

#[tokio::test]
async fn a_denied_name_is_refused_and_its_addresses_too() {
    let world = World::new(&[], &["bad.example.com"], PUBLIC).await;
    let answer = world.ask("bad.example.com.").await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(world.enforced()[0].contains("inet forkd denied { 93.184.215.14 timeout 90s }"));
    world.names.set_policy(Policy::default());
    assert_eq!(world.ask("bad.example.com.").await.answers.len(), 2);
}

#[tokio::test]
async fn nonsense_is_not_answered_and_does_no_harm() {
    let world = World::new(&[], &[], PUBLIC).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let response = reply(&query(1, "example.com."), PUBLIC);
    for nonsense in [&[][..], &[0; 11], &[0xff; 600], &response] {
        socket.send_to(nonsense, world.server).await.unwrap();
    }
    assert_eq!(world.ask("www.example.com.").await.answers.len(), 2);
    let nothing =
        tokio::time::timeout(Duration::from_millis(100), socket.recv(&mut [0; 512])).await;
    assert!(nothing.is_err(), "it answered");
}

#[test]
fn servers_are_read_from_resolv_conf() {
    let text = "# by hand\nsearch example.com\nnameserver 192.0.2.53\nnameserver ::1\nnameserver fe80::1%eth0\noptions edns0\n";
    let expected: Vec<SocketAddr> = vec![
        "192.0.2.53:53".parse().unwrap(),
        "[::1]:53".parse().unwrap(),
    ];
    assert_eq!(servers(text), expected);
}
