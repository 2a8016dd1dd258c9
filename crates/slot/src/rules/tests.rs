//! Tests of the rules, by their text and by the kernel's word.

use std::net::Ipv4Addr;

use super::*;

const OUTER: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 9);

fn policy(allow: &[&str], deny: &[&str]) -> Policy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap()
}

/// The egress chain alone, which is what policies differ in.
fn egress(policy: &Policy, refused: &[Ipv4Net]) -> Vec<String> {
    let text = slot(OUTER, policy, refused, 7);
    let chain = text.split("chain egress {\n").nth(1).unwrap();
    chain
        .split("\n}")
        .next()
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn never_comes_first_and_the_default_last() {
    let cluster: Ipv4Net = "198.51.100.0/24".parse().unwrap();
    let rules = egress(
        &policy(
            &["10.1.0.0/16:443", "2001:db8::/32"],
            &["all:25", "192.0.2.9"],
        ),
        &[cluster],
    );
    let at = |wanted: &str| {
        rules
            .iter()
            .position(|rule| rule == wanted)
            .unwrap_or_else(|| panic!("{wanted} in {rules:#?}"))
    };
    assert_eq!(
        at(
            "ip daddr { 0.0.0.0/8, 10.42.0.0/15, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4 } drop"
        ),
        0
    );
    let order = [
        at("ip daddr @allowed goto permit"),
        at("ip daddr 10.1.0.0/16 tcp dport 443 goto permit"),
        at("ip daddr @denied drop"),
        at("tcp dport 25 drop"),
        at("ip daddr 192.0.2.9/32 drop"),
        at("ip daddr 198.51.100.0/24 drop"),
        at("goto permit"),
    ];
    assert!(order.is_sorted(), "{rules:#?}");
    assert_eq!(order[6], rules.len() - 1);
    assert!(
        !rules.iter().any(|rule| rule.contains("2001:")),
        "{rules:#?}"
    );
}

#[test]
fn no_network_is_nothing_but_a_drop() {
    assert_eq!(egress(&Policy::NONE, &[]), ["drop"]);
}

#[test]
fn slots_and_guests_are_among_what_is_never_reached() {
    let never: Vec<Ipv4Net> = NEVER.iter().map(|net| net.parse().unwrap()).collect();
    for net in [address::guest_network(), address::slot_network()] {
        assert!(never.iter().any(|never| never.contains(&net)), "{net}");
    }
    assert!(PRIVATE.iter().all(|net| net.parse::<Ipv4Net>().is_ok()));
    let cluster: Ipv4Net = "198.51.100.0/24".parse().unwrap();
    for (address, expected) in [
        ("8.8.8.8", true),
        ("198.51.100.7", false),
        ("169.254.169.254", false),
        ("10.0.0.1", false),
        ("100.100.100.200", false),
        ("168.63.129.16", false),
    ] {
        assert_eq!(
            is_public(address.parse().unwrap(), &[cluster]),
            expected,
            "{address}"
        );
    }
}

#[test]
fn addresses_of_names_get_fresh_time() {
    let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let rules = resolved(Verdict::Allow, &addresses, Some(443), 30);
    assert_eq!(
        rules,
        "add element ip forkd allowed_ports { 192.0.2.1 . 443 timeout 90s }\n\
         delete element ip forkd allowed_ports { 192.0.2.1 . 443 }\n\
         add element ip forkd allowed_ports { 192.0.2.1 . 443 timeout 90s }\n"
    );
    assert!(
        resolved(Verdict::Deny, &addresses[..1], None, 0)
            .contains("ip forkd denied { 192.0.2.1 timeout 60s }")
    );
}

/// The kernel's word counts, not ours.
#[test]
fn the_kernel_takes_the_rules() {
    use forkd_host::net::{netns, nft};
    let name = format!("forkd-test-rules-{}", std::process::id());
    let space = netns::Netns::create(&name).expect("this test needs root and network namespaces");
    let full = policy(
        &["10.1.0.0/16:443", "*.example.com"],
        &["all:25", "192.0.2.9"],
    );
    let cluster: Ipv4Net = "198.51.100.0/24".parse().unwrap();
    let mut texts = vec![host(), host(), slot(OUTER, &Policy::NONE, &[], 1)];
    texts.push(slot(OUTER, &full, &[cluster], 2));
    for (verdict, port) in [(Verdict::Allow, Some(443)), (Verdict::Deny, None)] {
        texts.push(resolved(verdict, &["192.0.2.1".parse().unwrap()], port, 30));
        texts.push(resolved(verdict, &["192.0.2.1".parse().unwrap()], port, 40));
    }
    for text in texts {
        let applied = space.enter(|| nft::apply(&text)).unwrap();
        applied.unwrap_or_else(|e| panic!("{e}\n{text}"));
    }
    let table = space
        .enter(|| nft::table("ip", TABLE))
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(table.contains("192.0.2.1 . 443 timeout 100s"), "{table}");
    netns::delete(&name).unwrap();
}
