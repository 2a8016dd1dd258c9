//! Tests of what rules mean.

use proptest::prelude::*;

use super::*;

fn rule(text: &str) -> Rule {
    text.parse().unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn rules_are_read_and_printed() {
    for (text, printed) in [
        ("all", "all"),
        ("0.0.0.0/0", "all"),
        ("::/0:443", "all:443"),
        ("all:53", "all:53"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("192.0.2.7:443", "192.0.2.7/32:443"),
        ("10.1.2.3/16", "10.1.0.0/16"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("[2001:db8::1]:443", "[2001:db8::1/128]:443"),
        ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
        ("Example.COM.", "example.com"),
        ("*.example.com:8443", "*.example.com:8443"),
        ("_sip.example.com", "_sip.example.com"),
    ] {
        assert_eq!(rule(text).to_string(), printed, "{text}");
        assert_eq!(rule(printed).to_string(), printed);
    }
}

#[test]
fn what_is_no_rule_is_refused_and_shown() {
    for text in [
        "",
        "*",
        "*.",
        ":443",
        "example.com:",
        "example.com:0",
        "example.com:70000",
        "example.com:http",
        "10.0.0.0/33",
        "10.0.0",
        "256.1.1.1",
        "a..b",
        "-a.example",
        "a b",
        "exa\"mple.com",
        "example.com}; drop",
        "*.*.example.com",
        "évil.example",
    ] {
        let said = text.parse::<Rule>().unwrap_err().to_string();
        assert!(said.contains(&format!("{text:?}")), "{said}");
    }
    let long = format!("{}.example", "a".repeat(64));
    assert!(long.parse::<Rule>().is_err());
}

#[test]
fn a_domain_is_itself_and_a_star_is_what_is_below() {
    let (one, below) = (rule("example.com").target, rule("*.example.com").target);
    for (name, is_one, is_below) in [
        ("example.com", true, false),
        ("EXAMPLE.com.", true, false),
        ("www.example.com", false, true),
        ("a.b.example.com.", false, true),
        ("badexample.com", false, false),
        (".example.com", false, false),
        ("example.com.evil.net", false, false),
    ] {
        assert_eq!(
            (one.names(name), below.names(name)),
            (is_one, is_below),
            "{name}"
        );
    }
}

#[test]
fn names_are_looked_up_only_where_they_could_be_reached() {
    let policy = |allow: &[&str], deny: &[&str]| {
        let rules = |texts: &[&str]| texts.iter().map(|text| rule(text)).collect();
        Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap()
    };
    for (policy, name, expected) in [
        (policy(&[], &[]), "example.com", true),
        (policy(&[], &["example.com"]), "example.com", false),
        (policy(&[], &["example.com"]), "www.example.com", true),
        (policy(&[], &["example.com:25"]), "example.com", true),
        (policy(&["example.com"], &["all"]), "example.com", true),
        (policy(&["example.com:443"], &["all"]), "example.com", true),
        (policy(&["example.com"], &["all"]), "secret.evil.net", false),
        (policy(&["192.0.2.0/24"], &["all"]), "example.com", false),
        (
            policy(&["a.example.com"], &["*.example.com"]),
            "a.example.com",
            true,
        ),
        (
            policy(&["a.example.com"], &["*.example.com"]),
            "b.example.com",
            false,
        ),
        (Policy::NONE, "example.com", false),
    ] {
        assert_eq!(policy.may_look_up(name), expected, "{name} with {policy:?}");
    }
}

#[test]
fn too_much_and_too_little_is_refused() {
    let many = vec![rule("192.0.2.1"); MAX_RULES + 1];
    assert_eq!(
        Policy::new(Mode::Nat, many, vec![]),
        Err(Error::TooMany {
            count: MAX_RULES + 1
        })
    );
    assert_eq!(
        Policy::new(Mode::None, vec![rule("all")], vec![]),
        Err(Error::NoNetwork)
    );
}

proptest! {
    /// Whatever is accepted may stand in a text of rules: it holds nothing that could end or begin anything there.
    #[test]
    fn what_is_accepted_is_harmless(text in ".{0,80}") {
        if let Ok(rule) = text.parse::<Rule>() {
            let printed = rule.to_string();
            prop_assert!(printed.bytes().all(|b| b.is_ascii_alphanumeric() || b"*.:/[]-_".contains(&b)), "{}", printed);
            prop_assert_eq!(printed.parse::<Rule>().unwrap(), rule);
        }
    }
}
