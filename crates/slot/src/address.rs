//! Names and addresses of slots. They follow from the number alone, so that a crash can be cleaned up without records.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// The most slots a node has.
pub const MAX_SLOTS: u32 = 4000;

/// The first user of sandboxes: a slot's is as far from it as the slot's number. From here to 0x7fff_fffe nobody else
/// assigns users: <https://systemd.io/UIDS-GIDS/>.
pub const FIRST_USER: u32 = 0x7000_0000;

/// Begins the name of every slot's network namespace.
pub const NETNS_PREFIX: &str = "forkd-child-";
/// The guest's side of a slot.
pub const TAP: &str = "forkd-tap0";
/// The outer device in the slot's namespace.
pub const UPLINK: &str = "veth0";
/// Begins the name of the outer device's other end, on the host.
pub const VETH_PREFIX: &str = "forkd-v-";

/// Every guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
/// Every guest's gateway and name server.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
/// Every gateway's hardware address. A fork remembers its parent's gateway, and must find it where it was.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xfc, 10, 42, 0, 1];
/// Length of the guests' network prefix.
pub const GUEST_PREFIX: u8 = 24;
/// Every slot's gateway to the host. No device has it: slots are told whose hardware address to send to.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 1);
/// The hardware address of the host's end of every slot.
pub const HOST_MAC: [u8; 6] = [0x02, 0xfc, 10, 43, 0, 1];

/// Every guest's address of version 6, where the host has a way out for it. The networks are unique local ones, RFC 4193,
/// whose global id spells `forkd`.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6f72, 0x6b64, 0x42, 0, 0, 0, 2);
/// Every guest's gateway of version 6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6f72, 0x6b64, 0x42, 0, 0, 0, 1);
/// Length of the guests' network prefix of version 6.
pub const GUEST_PREFIX6: u8 = 64;
/// Every slot's gateway of version 6 to the host, as [`HOST`].
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6f72, 0x6b64, 0x43, 0, 0, 0, 1);

/// The network of the slots' outer addresses of version 6.
pub fn slot_network6() -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd66, 0x6f72, 0x6b64, 0x43, 0, 0, 0, 0), 64)
}

/// A slot's address of version 6 outside of its namespace.
pub fn outer6(index: u32) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(HOST6) + 1 + u128::from(index))
}

/// The network that all guests believe to be alone in.
pub fn guest_network() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 42, 0, 0), 16)
}

/// The network of the slots' outer addresses.
pub fn slot_network() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 43, 0, 0), 16)
}

/// The name of a slot's network namespace.
pub fn netns(index: u32) -> String {
    format!("{NETNS_PREFIX}{index}")
}

/// The name of a slot's device on the host.
pub fn veth(index: u32) -> String {
    format!("{VETH_PREFIX}{index}h")
}

/// The user that a slot's VM runs as.
pub fn user(index: u32) -> u32 {
    FIRST_USER + index
}

/// A slot's address outside of its namespace.
pub fn outer(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(HOST) + 1 + index)
}

/// The hardware address of a slot's end towards the host.
pub fn outer_mac(index: u32) -> [u8; 6] {
    let [a, b, c, d] = outer(index).octets();
    [0x02, 0xfc, a, b, c, d]
}

/// The number of the slot that has this namespace.
pub fn index_of(netns: &str) -> Option<u32> {
    let index = number(netns.strip_prefix(NETNS_PREFIX)?)?;
    (netns == self::netns(index)).then_some(index)
}

/// The number of the slot that has this device on the host.
pub fn index_of_veth(link: &str) -> Option<u32> {
    let index = number(link.strip_prefix(VETH_PREFIX)?.strip_suffix('h')?)?;
    (link == veth(index)).then_some(index)
}

fn number(digits: &str) -> Option<u32> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .parse()
        .ok()
        .filter(|index| plain && *index < MAX_SLOTS)
}

/// [`GATEWAY_MAC`] as text, lower case with colons.
pub fn gateway_mac() -> String {
    GATEWAY_MAC.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_slot_has_its_own() {
        let all: HashSet<Ipv4Addr> = (0..MAX_SLOTS).map(outer).collect();
        assert_eq!(all.len(), MAX_SLOTS as usize);
        assert!(all.iter().all(|a| slot_network().contains(a) && *a != HOST));
        // The longest name of a device is 15 bytes; linux/if.h.
        assert!(veth(MAX_SLOTS - 1).len() <= 15);
        let all6: HashSet<Ipv6Addr> = (0..MAX_SLOTS).map(outer6).collect();
        assert_eq!(all6.len(), MAX_SLOTS as usize);
        assert!(
            all6.iter()
                .all(|a| slot_network6().contains(a) && *a != HOST6)
        );
        assert_eq!(&GUEST6.octets()[1..6], b"forkd");
        assert_eq!(outer(0), Ipv4Addr::new(10, 43, 0, 2));
        assert_eq!(outer(254), Ipv4Addr::new(10, 43, 1, 0));
    }

    #[test]
    fn only_our_own_names_are_ours() {
        assert_eq!(index_of("forkd-child-7"), Some(7));
        assert_eq!(index_of_veth(&veth(7)), Some(7));
        for other in ["forkd-v-h", "forkd-v-07h", "forkd-v-7", "forkd-v-4000h"] {
            assert_eq!(index_of_veth(other), None, "{other}");
        }
        for other in [
            "forkd-child-",
            "forkd-child-07",
            "forkd-child-+7",
            "forkd-child-4000",
            "child-7",
        ] {
            assert_eq!(index_of(other), None, "{other}");
        }
    }
}
