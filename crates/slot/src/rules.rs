//! Policies as rules of the kernel, in the words of `nft`.
//!
//! Two tables: one in each slot's namespace, which is the guest's own, and one on the host, which is the same for all.
//! Both drop what they do not know.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::address::{self, GATEWAY, GATEWAY6, GUEST, GUEST6, TAP, UPLINK, VETH_PREFIX};
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

/// The same of version 6. Besides what [`NEVER`] names, addresses that hold one of version 4, which would lead around its
/// rules where somebody translates or tunnels them (mapped and NAT64, both in `::/8`, 6to4 and Teredo), and the clouds'
/// metadata services, which are unique local.
pub const NEVER6: [&str; 9] = [
    "::/8",
    "2001::/32",
    "2002::/16",
    "fd00:ec2::/32",
    "fd20:ce::/32",
    "fd66:6f72:6b64::/48",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];

/// Where all global addresses of version 6 are; the rest of the space is reserved, or local as fc00::/7 is.
const GLOBAL6: &str = "2000::/3";

/// What is refused by default of [`GLOBAL6`]: what is for documentation, benchmarks and identifiers.
pub const PRIVATE6: [&str; 5] = [
    "2001:2::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:db8::/32",
    "3fff::/20",
];

/// Questions for neighbours and answers to them. Nothing else of version 6 that is for the link only comes in, least of
/// all an advertisement of a router.
const NEIGHBOURS: &str = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }";
/// How many link-local addresses a guest may be known by: every neighbour takes room in a table that is the whole
/// host's.
const NEIGHBOURS_MAX: u32 = 8;

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

/// The rules of slot `index`, for a guest of this policy. `refused` is refused by default besides [`PRIVATE`] and
/// [`PRIVATE6`]. A connection that was permitted bears the generation, so that under the next one it is judged again.
pub fn slot(index: u32, policy: &Policy, refused: &[IpNet], generation: u32) -> String {
    // The table is named first so that it is there to be deleted; all happens at once. Slots that a version before this
    // one made have a table of version 4 alone.
    format!(
        "table ip {TABLE}\ndelete table ip {TABLE}\n{}{}",
        nothing(),
        new_slot(index, policy, refused, generation)
    )
}

/// The same for a namespace that has no rules. Whoever deletes any waits until no processor uses them: that is most of
/// the time that rules take.
pub fn new_slot(index: u32, policy: &Policy, refused: &[IpNet], generation: u32) -> String {
    let (outer, outer6) = (address::outer(index), address::outer6(index));
    let mut text = format!(
        "table inet {TABLE} {{\n{}\
         chain input {{\n type filter hook input priority 0; policy drop;\n\
         ct state established,related accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} udp dport 53 accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} tcp dport 53 accept\n\
         iifname \"{TAP}\" ip saddr {GUEST} ip daddr {GATEWAY} icmp type echo-request accept\n\
         iifname \"{TAP}\" ip6 saddr {GUEST6} ip6 daddr {GATEWAY6} icmpv6 type echo-request accept\n\
         iifname \"{UPLINK}\" {NEIGHBOURS} accept\n\
         iifname \"{TAP}\" {NEIGHBOURS} ip6 saddr {{ ::, {GUEST6} }} accept\n\
         iifname \"{TAP}\" {NEIGHBOURS} ip6 saddr fe80::/10 add @neighbours {{ ip6 saddr }} accept\n}}\n\
         chain forward {{\n type filter hook forward priority 0; policy drop;\n\
         ct state invalid drop\n ct mark {generation} accept\n\
         iifname \"{TAP}\" oifname \"{UPLINK}\" ip saddr {GUEST} jump egress\n\
         iifname \"{TAP}\" oifname \"{UPLINK}\" ip6 saddr {GUEST6} jump egress6\n}}\n\
         chain permit {{\n ct mark set {generation} accept\n}}\n",
        sets(),
    );
    for family in [Family::V4, Family::V6] {
        egress(&mut text, family, policy, refused);
    }
    let _ = write!(
        text,
        "chain postrouting {{\n type nat hook postrouting priority 100; policy accept;\n\
         oifname \"{UPLINK}\" meta nfproto ipv4 snat ip to {outer}\n\
         oifname \"{UPLINK}\" ip6 saddr {GUEST6} snat ip6 to {outer6}\n}}\n}}\n"
    );
    text
}

/// The chain that judges what a guest begins, of one family of addresses.
fn egress(text: &mut String, family: Family, policy: &Policy, refused: &[IpNet]) {
    let (suffix, to) = (family.suffix(), family.to());
    let _ = writeln!(text, "chain egress{suffix} {{");
    if policy.mode() == Mode::None {
        text.push_str("drop\n}\n");
        return;
    }
    let _ = writeln!(text, "{to} {{ {} }} drop", family.never().join(", "));
    by_name(text, family, Verdict::Allow);
    by_address(text, family, policy.allow(), PERMIT);
    by_name(text, family, Verdict::Deny);
    by_address(text, family, policy.deny(), "drop");
    if family == Family::V6 {
        let _ = writeln!(text, "{to} != {GLOBAL6} drop");
    }
    let _ = writeln!(text, "{to} {{ {} }} drop", family.private().join(", "));
    for net in refused.iter().filter(|net| family.has(net)) {
        let _ = writeln!(text, "{to} {net} drop");
    }
    let _ = writeln!(text, "{PERMIT}\n}}");
}

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    fn has(self, net: &IpNet) -> bool {
        self == Self::of(net.addr())
    }

    /// Ends the names of chains and sets.
    fn suffix(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => "6",
        }
    }

    /// Begins a rule about where a packet goes.
    fn to(self) -> &'static str {
        match self {
            Self::V4 => "ip daddr",
            Self::V6 => "ip6 daddr",
        }
    }

    fn never(self) -> &'static [&'static str] {
        match self {
            Self::V4 => &NEVER,
            Self::V6 => &NEVER6,
        }
    }

    fn private(self) -> &'static [&'static str] {
        match self {
            Self::V4 => &PRIVATE,
            Self::V6 => &PRIVATE6,
        }
    }
}

fn sets() -> String {
    let mut text =
        format!("set neighbours {{\n type ipv6_addr\n flags dynamic\n size {NEIGHBOURS_MAX}\n}}\n");
    for (family, address) in [(Family::V4, "ipv4_addr"), (Family::V6, "ipv6_addr")] {
        for verdict in [Verdict::Allow, Verdict::Deny] {
            let set = format!("{}{}", verdict.word(), family.suffix());
            let _ = write!(
                text,
                "set {set} {{\n type {address}\n flags timeout\n size 65536\n}}\n\
                 set {set}_ports {{\n type {address} . inet_service\n flags timeout\n size 65536\n}}\n"
            );
        }
    }
    text
}

fn by_name(text: &mut String, family: Family, verdict: Verdict) {
    let action = match verdict {
        Verdict::Allow => PERMIT,
        Verdict::Deny => "drop",
    };
    let (to, set) = (
        family.to(),
        format!("{}{}", verdict.word(), family.suffix()),
    );
    let _ = write!(
        text,
        "{to} @{set} {action}\n{to} . tcp dport @{set}_ports {action}\n\
         {to} . udp dport @{set}_ports {action}\n"
    );
}

fn by_address(text: &mut String, family: Family, rules: &[Rule], action: &str) {
    for rule in rules {
        let to = match &rule.target {
            Target::All => String::new(),
            Target::Network(net) if family.has(net) => format!("{} {net} ", family.to()),
            Target::Network(_) => continue,
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
    let timeout = seconds.saturating_add(GRACE_SECS);
    let (ports, of_port) = match port {
        Some(port) => ("_ports", format!(" . {port}")),
        None => ("", String::new()),
    };
    let mut text = String::new();
    for address in addresses {
        let set = format!("{}{}{ports}", verdict.word(), Family::of(*address).suffix());
        let element = format!("{address}{of_port}");
        // An element that is there already keeps its old time: it must go first, and to go it must be there.
        let _ = write!(
            text,
            "add element inet {TABLE} {set} {{ {element} timeout {timeout}s }}\n\
             delete element inet {TABLE} {set} {{ {element} }}\n\
             add element inet {TABLE} {set} {{ {element} timeout {timeout}s }}\n"
        );
    }
    text
}

/// The rules of the host. Nothing from a slot reaches this machine or another slot, and nothing begins a connection
/// towards a slot.
pub fn host() -> String {
    let (slots, slots6) = (address::slot_network(), address::slot_network6());
    format!(
        "{}table inet {TABLE} {{\n\
         chain input {{\n type filter hook input priority -10; policy accept;\n\
         iifname \"{VETH_PREFIX}*\" ct state established,related accept\n\
         iifname \"{VETH_PREFIX}*\" {NEIGHBOURS} ip6 hoplimit 255 accept\n\
         iifname \"{VETH_PREFIX}*\" drop\n}}\n\
         chain forward {{\n type filter hook forward priority -10; policy accept;\n\
         iifname \"{VETH_PREFIX}*\" oifname \"{VETH_PREFIX}*\" drop\n\
         iifname \"{VETH_PREFIX}*\" ip daddr {{ {} }} drop\n\
         iifname \"{VETH_PREFIX}*\" ip saddr != {slots} drop\n\
         iifname \"{VETH_PREFIX}*\" ip6 daddr {{ {} }} drop\n\
         iifname \"{VETH_PREFIX}*\" ip6 saddr != {slots6} drop\n\
         oifname \"{VETH_PREFIX}*\" ct state established,related accept\n\
         oifname \"{VETH_PREFIX}*\" drop\n}}\n\
         chain postrouting {{\n type nat hook postrouting priority 100; policy accept;\n\
         ip saddr {slots} oifname != \"{VETH_PREFIX}*\" masquerade\n\
         ip6 saddr {slots6} oifname != \"{VETH_PREFIX}*\" masquerade\n}}\n}}\n",
        nothing(),
        NEVER.join(", "),
        NEVER6.join(", "),
    )
}

/// Takes the rules of the host, or of a slot, away.
pub fn nothing() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// Whether an address is one that the default would permit: a name may not lead around the default, only a rule that
/// names the address itself.
pub fn is_public(address: IpAddr, refused: &[IpNet]) -> bool {
    let family = Family::of(address);
    let listed = family.never().iter().chain(family.private());
    let listed = listed.filter_map(|net| net.parse::<IpNet>().ok());
    let is_global = match address {
        IpAddr::V4(_) => true,
        // The first three bits of GLOBAL6.
        IpAddr::V6(address) => address.segments()[0] >> 13 == 1,
    };
    let mut refusing = listed.chain(refused.iter().copied());
    is_global && !refusing.any(|net| net.contains(&address))
}
