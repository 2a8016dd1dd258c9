//! Network slots made by hand and taken away, each test on a host of its own: namespaces with their own /run.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::world::{Said, finish};

/// Runs a shell script where there is nothing: no slot, no node, no rule. `forkd` is the program.
fn on_new_host(script: &str) -> Said {
    let dir = tempfile::tempdir().unwrap();
    let prepare = "mount -t tmpfs tmpfs /run; ip link set lo up";
    let mut command = Command::new("unshare");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FORKD_") {
            command.env_remove(name);
        }
    }
    command
        .args(["--mount", "--net", "--propagation", "private"])
        // The processes of others are none of this host's either.
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-euc", &format!("{prepare}\n{script}")])
        .env("forkd", env!("CARGO_BIN_EXE_forkd"))
        .env("FORKD_DATA_DIR", dir.path().join("data"))
        .env("FORKD_RUN_DIR", dir.path().join("run"))
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    finish(command)
}

#[test]
fn slots_are_set_up_once_and_torn_down_to_nothing() {
    let said = on_new_host(
        r#"
        "$forkd" netns setup 2 --json > /run/first
        "$forkd" netns setup 2 --json > /run/second
        ip netns exec forkd-child-1 ip -4 -o addr show forkd-tap0 >&2
        ip -o link show forkd-v-1h >&2
        nft list table inet forkd >&2
        "$forkd" netns teardown --dry-run --json > /run/third
        test -e /run/netns/forkd-child-0
        # Made by hand, by nobody's record.
        ip netns add forkd-child-77
        ip netns add somebody-elses
        "$forkd" netns teardown --json > /run/fourth
        test "$(ls /run/netns)" = somebody-elses
        test -z "$(ip -o link show type veth)"
        if nft list table inet forkd > /dev/null 2>&1; then exit 9; fi
        "$forkd" netns teardown
        cd /run; echo "[$(cat first), $(cat second), $(cat third), $(cat fourth)]"
        "#,
    );
    let answers: Value = serde_json::from_str(&said.ok()).unwrap();
    assert_eq!(
        (&answers[0]["ready"], &answers[0]["made"]),
        (&2.into(), &2.into())
    );
    assert_eq!(
        (&answers[1]["ready"], &answers[1]["made"]),
        (&2.into(), &0.into())
    );
    let slot = &answers[0]["slots"][1];
    assert_eq!(slot["netns"], "forkd-child-1");
    assert_eq!(slot["tap"], "forkd-tap0");
    assert_eq!(
        (&slot["guest"], &slot["gateway"]),
        (&"10.42.0.2".into(), &"10.42.0.1".into())
    );
    let two = serde_json::json!(["forkd-child-0", "forkd-child-1"]);
    assert_eq!(
        (&answers[2]["removed"], &answers[2]["dry_run"]),
        (&two, &true.into())
    );
    let all = serde_json::json!(["forkd-child-0", "forkd-child-1", "forkd-child-77"]);
    assert_eq!(
        (&answers[3]["removed"], &answers[3]["kept"]),
        (&all, &serde_json::json!([]))
    );
    assert_eq!(answers[3]["host_rules_removed"], true);
}

#[test]
fn a_setup_that_is_interrupted_or_killed_leaves_nothing() {
    let said = on_new_host(
        r#"
        nothing() {
            test -z "$(ls /run/netns)"
            test -z "$(ip -o link show type veth)"
            test -z "$(ls /run/forkd-slots | grep '^[0-9]')"
            test -z "$(ls /run/forkd-slots/reserve)"
        }
        "$forkd" netns setup 2000 & pid=$!
        until test -e /run/netns/forkd-child-40; do sleep 0.02; done
        kill -INT $pid
        code=0; wait $pid || code=$?
        test $code = 130
        nothing
        "$forkd" netns setup 2000 & pid=$!
        until test -e /run/netns/forkd-child-40; do sleep 0.02; done
        if "$forkd" netns setup 1; then exit 9; fi
        kill -KILL $pid
        wait $pid || true
        "$forkd" netns teardown
        nothing
        # Whoever comes next takes what is whole and removes what is not.
        "$forkd" netns setup 2000 & pid=$!
        until test -e /run/netns/forkd-child-20; do sleep 0.02; done
        kill -KILL $pid
        wait $pid || true
        "$forkd" netns setup 60 --json > /run/made
        test "$(ls /run/forkd-slots/reserve | wc -l)" -ge 60
        test "$(ls /run/forkd-slots/reserve | wc -l)" = "$(ls /run/netns | wc -l)"
        "$forkd" netns teardown
        nothing
        "#,
    );
    said.ok();
}

#[test]
fn a_limit_of_the_host_is_named_and_nothing_is_left() {
    let said = on_new_host(
        r#"
        # Limits are counted for each user namespace.
        unshare --user --map-root-user --mount --net sh -euc '
            mount -t tmpfs tmpfs /run
            echo 12 > /proc/sys/user/max_net_namespaces
            code=0
            "$forkd" netns setup 30 2> /run/said || code=$?
            test $code = 1
            cat /run/said
            test -z "$(ls /run/netns)"
            test -z "$(ip -o link show type veth)"
        '
        "#,
    );
    let said = said.ok();
    assert!(
        said.contains("user.max_net_namespaces is 12") && said.contains("sysctl -w"),
        "{said}"
    );
}

#[test]
fn a_daemon_takes_what_waits_and_keeps_it_while_it_runs() {
    let said = on_new_host(
        r#"
        "$forkd" netns setup 5 --json > /dev/null
        before=$(stat -c %i /run/netns/forkd-child-0)
        start() {
            "$forkd" serve --bind 127.0.0.1:0 --audit-log none --net nat --slots 2 2> /run/log & pid=$!
            until grep -q "serving addr=" /run/log; do kill -0 $pid; sleep 0.05; done
            until test "$(ls /run/forkd-slots/reserve | wc -l)" -le "$1"; do sleep 0.05; done
        }
        start 3
        test "$(stat -c %i /run/netns/forkd-child-0)" = "$before"
        "$forkd" netns teardown --json > /run/running
        test -e /run/netns/forkd-child-0
        nft list table inet forkd > /dev/null
        # What a killed daemon left goes, too, with its files or without.
        kill -KILL $pid; wait $pid || true
        test -e /run/netns/forkd-child-0
        "$forkd" netns teardown --json > /run/killed
        test -z "$(ls /run/netns)"
        cd /run; echo "[$(cat running), $(cat killed)]"
        "#,
    );
    let answers: Value = serde_json::from_str(&said.ok()).unwrap();
    let kept = answers[0]["kept"].as_array().unwrap();
    // As many as it was told to keep ready, and perhaps the one that it began with.
    assert!((2..=3).contains(&kept.len()), "{answers}");
    let reason = kept[0]["reason"].as_str().unwrap();
    assert!(reason.contains("state.db is running"), "{reason}");
    let removed = answers[0]["removed"].as_array().unwrap();
    assert_eq!(removed.len() + kept.len(), 5, "{answers}");
    assert_eq!(answers[0]["host_rules_removed"], false);
    let names = kept.iter().map(|kept| kept["netns"].clone());
    assert_eq!(answers[1]["removed"], names.collect::<Value>());
    assert_eq!(answers[1]["host_rules_removed"], true);
}

#[test]
fn what_somebody_uses_is_kept_and_said() {
    let said = on_new_host(
        r#"
        "$forkd" netns setup 140 --json > /dev/null
        # A process of the second slot's user.
        setpriv --reuid $((0x70000001)) --clear-groups sleep 60 & pid=$!
        until grep -q $((0x70000001)) /proc/$pid/status; do sleep 0.02; done
        "$forkd" netns teardown > /run/said
        test "$(ls /run/netns)" = forkd-child-1
        test "$(ip -o link show type veth | wc -l)" = 1
        kill $pid; wait $pid || true
        cat /run/said; echo "pid $pid"
        "$forkd" netns teardown
        test -z "$(ls /run/netns)"
        "#,
    );
    let said = said.ok();
    let pid = said.lines().last().unwrap().strip_prefix("pid ").unwrap();
    assert!(
        said.contains(&format!("forkd-child-1 kept: process {pid} runs in it")),
        "{said}"
    );
}

#[test]
fn others_than_root_are_told_so() {
    let said = on_new_host(
        r#"
        code=0
        setpriv --reuid 65534 --clear-groups "$forkd" netns setup 1 2> /run/said || code=$?
        test $code = 1
        cat /run/said
        "#,
    );
    let said = said.ok();
    assert!(said.contains("belong to root"), "{said}");
}
