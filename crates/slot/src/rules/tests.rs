//! Tests of the rules, by their text and by the kernel's word.

use super::*;

const SLOT: u32 = 7;

fn policy(allow: &[&str], deny: &[&str]) -> Policy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap()
}

/// The egress chain of a family alone, which is what policies differ in.
fn egress(suffix: &str, policy: &Policy, refused: &[IpNet]) -> Vec<String> {
    let text = slot(SLOT, policy, refused, 7);
    let begin = format!("chain egress{suffix} {{\n");
    let chain = text.split(&begin).nth(1).unwrap();
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
    let clusters = ["198.51.100.0/24", "2a00:1::/32"].map(|net| net.parse().unwrap());
    let policy = policy(
        &["10.1.0.0/16:443", "2001:db8::/32"],
        &["all:25", "192.0.2.9", "[2606::7]:80"],
    );
    let [rules, rules6] = ["", "6"].map(|family| egress(family, &policy, &clusters));
    let at = |rules: &[String], wanted: &str| {
        rules
            .iter()
            .position(|rule| rule == wanted)
            .unwrap_or_else(|| panic!("{wanted} in {rules:#?}"))
    };
    let at6 = |wanted: &str| at(&rules6, wanted);
    let order6 = [
        at6(&format!("ip6 daddr {{ {} }} drop", NEVER6.join(", "))),
        at6("ip6 daddr @allowed6 goto permit"),
        at6("ip6 daddr 2001:db8::/32 goto permit"),
        at6("ip6 daddr @denied6 drop"),
        at6("tcp dport 25 drop"),
        at6("ip6 daddr 2606::7/128 tcp dport 80 drop"),
        at6("ip6 daddr != 2000::/3 drop"),
        at6("ip6 daddr 2a00:1::/32 drop"),
        at6("goto permit"),
    ];
    assert!(order6.is_sorted(), "{rules6:#?}");
    assert_eq!((order6[0], order6[8]), (0, rules6.len() - 1));
    let foreign = |rule: &&String| rule.contains("ip daddr");
    assert_eq!(rules6.iter().find(foreign), None);
    let at = |wanted: &str| at(&rules, wanted);
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
    assert!(!rules.iter().any(|rule| rule.contains("ip6")), "{rules:#?}");
}

#[test]
fn no_network_is_nothing_but_a_drop() {
    for family in ["", "6"] {
        assert_eq!(egress(family, &Policy::NONE, &[]), ["drop"]);
    }
}

#[test]
fn slots_and_guests_are_among_what_is_never_reached() {
    let parse = |net: &&str| net.parse::<IpNet>().unwrap();
    let never: Vec<IpNet> = NEVER.iter().chain(&NEVER6).map(parse).collect();
    let both = [address::guest_network(), address::slot_network()].map(IpNet::V4);
    let both6 = [address::GUEST6, address::HOST6, address::outer6(9)]
        .map(|address| IpNet::from(IpAddr::V6(address)));
    for net in both.iter().chain(&both6) {
        assert!(never.iter().any(|never| never.contains(net)), "{net}");
    }
    let private = PRIVATE.iter().chain(&PRIVATE6);
    assert!(private.map(parse).all(|net| net.prefix_len() > 0));
    let clusters = ["198.51.100.0/24", "2a00:1::/32"].map(|net| net.parse().unwrap());
    for (address, expected) in [
        ("8.8.8.8", true),
        ("198.51.100.7", false),
        ("169.254.169.254", false),
        ("10.0.0.1", false),
        ("100.100.100.200", false),
        ("168.63.129.16", false),
        ("2606:2800::1", true),
        ("2001:4860:4860::8888", true),
        ("2a00:1::7", false),
        ("::1", false),
        ("::ffff:8.8.8.8", false),
        ("::8.8.8.8", false),
        ("64:ff9b::808:808", false),
        ("2002:808:808::1", false),
        ("2001:0:808:808::1", false),
        ("2001:db8::1", false),
        ("fc00::1", false),
        ("fd00:ec2::254", false),
        ("fe80::1", false),
        ("ff02::1", false),
        ("4000::1", false),
    ] {
        assert_eq!(
            is_public(address.parse().unwrap(), &clusters),
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
        "add element inet forkd allowed_ports { 192.0.2.1 . 443 timeout 90s }\n\
         delete element inet forkd allowed_ports { 192.0.2.1 . 443 }\n\
         add element inet forkd allowed_ports { 192.0.2.1 . 443 timeout 90s }\n\
         add element inet forkd allowed6_ports { 2001:db8::1 . 443 timeout 90s }\n\
         delete element inet forkd allowed6_ports { 2001:db8::1 . 443 }\n\
         add element inet forkd allowed6_ports { 2001:db8::1 . 443 timeout 90s }\n"
    );
    assert!(
        resolved(Verdict::Deny, &addresses[..1], None, 0)
            .contains("inet forkd denied { 192.0.2.1 timeout 60s }")
    );
}

/// The kernel's word counts, not ours.
#[test]
fn the_kernel_takes_the_rules() {
    use forkd_host::net::{netns, nft};
    let name = format!("forkd-test-rules-{}", std::process::id());
    let space = netns::Netns::create(&name).expect("this test needs root and network namespaces");
    let full = policy(
        &["10.1.0.0/16:443", "*.example.com", "[fc00::/8]:443"],
        &["all:25", "192.0.2.9", "2606::9"],
    );
    let cluster: IpNet = "198.51.100.0/24".parse().unwrap();
    // What a version before this one left.
    let old = "table ip forkd {\n chain forward {\n type filter hook forward priority 0; policy drop;\n}\n}\n".to_owned();
    let mut texts = vec![old, host(), host(), slot(SLOT, &Policy::NONE, &[], 1)];
    texts.push(slot(SLOT, &full, &[cluster], 2));
    for (verdict, port) in [(Verdict::Allow, Some(443)), (Verdict::Deny, None)] {
        let addresses = ["192.0.2.1", "2606::1"].map(|address| address.parse().unwrap());
        texts.push(resolved(verdict, &addresses, port, 30));
        texts.push(resolved(verdict, &addresses, port, 40));
    }
    for text in texts {
        let applied = space.enter(|| nft::apply(&text)).unwrap();
        applied.unwrap_or_else(|e| panic!("{e}\n{text}"));
    }
    let table = space
        .enter(|| nft::table("inet", TABLE))
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(table.contains("192.0.2.1 . 443 timeout 100s"), "{table}");
    assert!(table.contains("2606::1 . 443 timeout 100s"), "{table}");
    let old = space.enter(|| nft::table("ip", TABLE)).unwrap().unwrap();
    assert_eq!(old, None, "an old table is in force beside the new one");
    netns::delete(&name).unwrap();
}
