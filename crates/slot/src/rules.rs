//! Policies as rules of the kernel, in the words of `nft`.
//!
//! Two tables: one in each slot's namespace, which is the guest's own, and one on the host, which is the same for all.
//! Both drop what they do not know.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use crate::address::{self, GATEWAY, GUEST, TAP, UPLINK, VETH_PREFIX};
use crate::policy::{Mode, Policy, Rule, Target};

#[cfg(test)]
mod tests;

/// The name of both tables.
pub const TABLE: &str = "forkd";

/// What no policy can allow: this machine, link-local addresses with the clouds' metadata services among them, other
/// guests, and what is no single machine. RFC 6890.
pub const NEVER: [&str; 6] = [
    "0.0.0.0/8",
    "10.42.0.0/15",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// What the default keeps from a guest and a rule may allow: networks that are somebody's own. RFC 1918, 2544, 5736,
/// 5737, 6598; and the address of Alibaba's and Azure's metadata services, which are not link-local.
pub const PRIVATE: [&str; 9] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "168.63.129.16/32",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "203.0.113.0/24",
];

/// How long an address that a name was resolved to stays allowed after the answer has run out, seconds: a program
/// may look up once and connect a little later.
pub const GRACE_SECS: u32 = 60;

/// Ends the judgement of a connection in its favour.
const PERMIT: &str = "goto permit";

/// Which set an answer about a name goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// May be reached.
    Allow,
    /// May not be reached.
    Deny,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Allow => "allowed",
            Self::Deny => "denied",
        }
    }
}

/// The rules of a slot whose outer address is `outer`, for a guest of this policy. `refused` is refused by default
/// besides [`PRIVATE`]. A connection that was permitted bears the generation, so that under the next one it is judged
/// again.
pub fn slot(outer: Ipv4Addr, policy: &Policy, refused: &[Ipv4Net], generation: u32) -> String {
    let mut text = String::new();
    // So that the table is there to be deleted; both happen at once.
    let _ = write!(
        text,
        "table ip {TABLE}\ndelete table ip {TABLE}\ntable ip {TABLE} {{\n\
         {}\
         chain input {{\n type filter hook input priority 0; policy drop;\n\
         ct state established,related accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} udp dport 53 accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} tcp dport 53 accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} icmp type echo-request accept\n}}\n\
         chain forward {{\n type filter hook forward priority 0; policy drop;\n\
         ct state invalid drop\n ct mark {generation} accept\n\
         iifname \"{TAP}\" oifname \"{UPLINK}\" ip saddr {GUEST} jump egress\n}}\n\
         chain permit {{\n ct mark set {generation} accept\n}}\n",
        sets(),
    );
    text.push_str("chain egress {\n");
    if policy.mode() == Mode::Nat {
        let _ = writeln!(text, "ip daddr {{ {} }} drop", NEVER.join(", "));
        by_name(&mut text, Verdict::Allow);
        by_address(&mut text, policy.allow(), PERMIT);
        by_name(&mut text, Verdict::Deny);
        by_address(&mut text, policy.deny(), "drop");
        let _ = writeln!(text, "ip daddr {{ {} }} drop", PRIVATE.join(", "));
        for net in refused {
            let _ = writeln!(text, "ip daddr {net} drop");
        }
        let _ = writeln!(text, "{PERMIT}");
    } else {
        text.push_str("drop\n");
    }
    let _ = write!(
        text,
        "}}\nchain postrouting {{\n type nat hook postrouting priority 100; policy accept;\n\
         oifname \"{UPLINK}\" snat to {outer}\n}}\n}}\n"
    );
    text
}

fn sets() -> String {
    let mut text = String::new();
    for verdict in [Verdict::Allow, Verdict::Deny] {
        let word = verdict.word();
        let _ = write!(
            text,
            "set {word} {{\n type ipv4_addr\n flags timeout\n size 65536\n}}\n\
             set {word}_ports {{\n type ipv4_addr . inet_service\n flags timeout\n size 65536\n}}\n"
        );
    }
    text
}

fn by_name(text: &mut String, verdict: Verdict) {
    let (word, action) = match verdict {
        Verdict::Allow => (verdict.word(), PERMIT),
        Verdict::Deny => (verdict.word(), "drop"),
    };
    let _ = write!(
        text,
        "ip daddr @{word} {action}\nip daddr . tcp dport @{word}_ports {action}\n\
         ip daddr . udp dport @{word}_ports {action}\n"
    );
}

fn by_address(text: &mut String, rules: &[Rule], action: &str) {
    for rule in rules {
        let to = match &rule.target {
            Target::All => String::new(),
            Target::Network(IpNet::V4(net)) => format!("ip daddr {net} "),
            // A guest has no address of version 6, so there is nothing to allow or deny.
            Target::Network(IpNet::V6(_)) => continue,
            // By what its names resolve to.
            Target::Domain(_) | Target::Below(_) => continue,
        };
        match rule.port {
            None => {
                let _ = writeln!(text, "{to}{action}");
            }
            Some(port) => {
                let _ = writeln!(
                    text,
                    "{to}tcp dport {port} {action}\n{to}udp dport {port} {action}"
                );
            }
        }
    }
}

/// The rules that put the addresses of a name into a set of a slot, for `seconds` and the grace. With a port, only
/// that port.
pub fn resolved(verdict: Verdict, addresses: &[IpAddr], port: Option<u16>, seconds: u32) -> String {
    let word = verdict.word();
    let timeout = seconds.saturating_add(GRACE_SECS);
    let (set, of_port) = match port {
        Some(port) => (format!("{word}_ports"), format!(" . {port}")),
        None => (word.to_owned(), String::new()),
    };
    let mut text = String::new();
    for address in addresses.iter().filter(|address| address.is_ipv4()) {
        let element = format!("{address}{of_port}");
        // An element that is there already keeps its old time: it must go first, and to go it must be there.
        let _ = write!(
            text,
            "add element ip {TABLE} {set} {{ {element} timeout {timeout}s }}\n\
             delete element ip {TABLE} {set} {{ {element} }}\n\
             add element ip {TABLE} {set} {{ {element} timeout {timeout}s }}\n"
        );
    }
    text
}

/// The rules of the host. Nothing from a slot reaches this machine or another slot, and nothing begins a connection
/// towards a slot.
pub fn host() -> String {
    let slots = address::slot_network();
    format!(
        "{}table inet {TABLE} {{\n\
         chain input {{\n type filter hook input priority -10; policy accept;\n\
         iifname \"{VETH_PREFIX}*\" ct state established,related accept\n\
         iifname \"{VETH_PREFIX}*\" drop\n}}\n\
         chain forward {{\n type filter hook forward priority -10; policy accept;\n\
         iifname \"{VETH_PREFIX}*\" oifname \"{VETH_PREFIX}*\" drop\n\
         iifname \"{VETH_PREFIX}*\" ip daddr {{ {} }} drop\n\
         iifname \"{VETH_PREFIX}*\" ip saddr != {slots} drop\n\
         iifname \"{VETH_PREFIX}*\" meta nfproto ipv6 drop\n\
         oifname \"{VETH_PREFIX}*\" ct state established,related accept\n\
         oifname \"{VETH_PREFIX}*\" drop\n}}\n\
         chain postrouting {{\n type nat hook postrouting priority 100; policy accept;\n\
         ip saddr {slots} oifname != \"{VETH_PREFIX}*\" masquerade\n}}\n}}\n",
        no_host(),
        NEVER.join(", "),
    )
}

/// Takes the rules of the host away.
pub fn no_host() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// Whether an address is one that the default would permit: a name may not lead around the default, only a rule that
/// names the address itself.
pub fn is_public(address: Ipv4Addr, refused: &[Ipv4Net]) -> bool {
    let listed = NEVER
        .iter()
        .chain(&PRIVATE)
        .filter_map(|net| net.parse::<Ipv4Net>().ok());
    !listed
        .chain(refused.iter().copied())
        .any(|net| net.contains(&address))
}
