//! Commands that need no daemon.

use serde_json::Value;

use super::world::World;

#[test]
fn quickstart_answers_twice_and_leaves_nothing() {
    let Some(world) = World::new() else { return };
    let first = world.run(["quickstart", "-n", "3"]).ok();
    assert_eq!(
        first.lines().last(),
        Some("3 of 3 sandboxes answered"),
        "{first}"
    );
    assert!(
        first.contains("sum of squares to 3000 = 9004500500"),
        "{first}"
    );
    world.assert_clean(&["quickstart"]);

    let second = world.run(["quickstart", "-n", "2", "--json"]).ok();
    let json: Value = serde_json::from_str(&second).unwrap();
    assert_eq!(json["answered"], 2);
    assert_eq!(json["snapshot_reused"], true);
    for key in ["boot_ms", "snapshot_ms", "fork_wall_ms"] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key}: {json}");
    }
    for figure in ["p50", "p99", "max"] {
        assert!(
            json["ready_ms"][figure].as_f64().unwrap() > 0.0,
            "{figure}: {json}"
        );
    }
    assert!(
        json["private_kib_per_child"]["p50"].as_f64().unwrap() > 100.0,
        "{json}"
    );
    world.assert_clean(&["quickstart"]);

    // Somebody else's snapshot under the tag is not taken for ours.
    world.run(["rmi", "quickstart"]).ok();
    world.assert_clean(&[]);
}

#[test]
fn bench_measures_and_draws() {
    let Some(world) = World::seeded() else { return };
    let page = world.dir().join("bench.html");
    let page_name = page.to_str().unwrap();
    let out = world
        .run([
            "bench", "--tag", "seed", "--n", "2", "--json", "--html", page_name,
        ])
        .ok();
    let json: Value = serde_json::from_str(&out).unwrap();
    for stage in [
        "one_fork_ms",
        "ready_ms",
        "first_exec_ms",
        "exec_ms",
        "first_eval_ms",
        "kill_ms",
    ] {
        assert!(
            json["stages"][stage]["p50"].as_f64().unwrap() > 0.0,
            "{stage}: {json}"
        );
    }
    let idle = json["memory_idle"]["private_kib"]["p50"].as_f64().unwrap();
    let pss = json["memory_idle"]["pss_kib"]["p50"].as_f64().unwrap();
    assert!(idle > 0.0 && pss >= idle, "{json}");
    assert!(
        json["sizing"]["idle_sandboxes_per_gib"].as_u64().unwrap() > 0,
        "{json}"
    );
    assert!(
        std::fs::read_to_string(page)
            .unwrap()
            .ends_with("</html>\n")
    );
    world.assert_clean(&["seed"]);
}

#[test]
fn commands_for_running_sandboxes_say_how_to_start_a_daemon() {
    let Some(world) = World::new() else { return };
    let commands: [&[&str]; 5] = [
        &["fork", "--tag", "x"],
        &["ls"],
        &["exec", "sb-1", "--", "true"],
        &["cp", "x", "sb-1:/x"],
        &["logs", "sb-1"],
    ];
    for command in commands {
        let code = if command[0] == "exec" { 125 } else { 1 };
        world
            .run(command.iter().copied())
            .fails(code, &["daemon", "forkd serve"]);
    }
}

#[test]
fn doctor_finds_this_host_usable() {
    let Some(world) = World::new() else { return };
    let said = world.run(["doctor", "--json"]);
    let json: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(json["fail"], 0, "{json:#}");
    assert_eq!(said.code, Some(0));
}
