//! Sandboxes.

use http::Method;
use serde_json::{Value, json};

use crate::world::{World, id, request, until};

#[tokio::test]
async fn forked_listed_and_killed() {
    let world = World::new().await;
    world.snapshot("base").await;
    let answer = world
        .post("/v1/sandboxes", json!({"snapshot_tag": "base", "n": 3}))
        .await;
    for header in ["forkd-template-ms", "forkd-forked-ms", "forkd-ready-ms"] {
        let text = answer.headers[header].to_str().unwrap();
        assert!(text.parse::<f64>().is_ok(), "{header}: {text}");
    }
    let made = answer.expect(201);
    let made = made.as_array().unwrap();
    assert_eq!(made.len(), 3);
    for (index, sandbox) in made.iter().enumerate() {
        assert_eq!(sandbox["snapshot_tag"], "base");
        assert_eq!(sandbox["guest_addr"], "10.42.0.2:8888");
        assert_eq!(sandbox["state"], "running");
        assert_eq!(sandbox["engine"], "host");
        assert_eq!(sandbox["index"], index);
        assert_eq!(sandbox["has_branched"], false);
        assert_eq!(sandbox["netns"], Value::Null);
        assert!(sandbox["pid"].as_u64().unwrap() > 1);
        assert!(sandbox["stages"]["ready_ms"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(
        world
            .get("/v1/sandboxes")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        3
    );
    let first = format!("/v1/sandboxes/{}", id(&made[0]));
    assert_eq!(world.get(&first).await.expect(200)["id"], made[0]["id"]);

    world.delete(&first).await.expect(204);
    // As older clients know it: what was deleted is not there.
    assert_eq!(world.get(&first).await.refusal(404), "not_found");
    assert_eq!(world.delete(&first).await.refusal(404), "not_found");
    assert_eq!(
        world
            .post(&format!("{first}/ping"), Value::Null)
            .await
            .refusal(404),
        "not_found"
    );
    assert_eq!(
        world
            .get("/v1/sandboxes")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        2
    );
    world.close().await;
}

#[tokio::test]
async fn one_is_made_when_nothing_is_said_and_older_fields_are_accepted() {
    let world = World::new().await;
    world.snapshot("base").await;
    let body = json!({
        "snapshot_tag": "base", "per_child_netns": true, "prewarm": true, "live_fork": true,
        "hugepages": true, "something_new": 1,
    });
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    assert_eq!(made.as_array().unwrap().len(), 1);
    world.close().await;
}

#[tokio::test]
async fn requests_that_do_not_fit_are_refused() {
    let world = World::new().await;
    world.snapshot("base").await;
    for change in [
        json!({"n": 0}),
        json!({"n": 1001}),
        json!({"n": -1}),
        json!({"n": "one"}),
        json!({"snapshot_tag": "../base"}),
        json!({"snapshot_tag": null}),
        json!({"timeout_secs": 0}),
        json!({"timeout_secs": u64::MAX}),
        json!({"ready_timeout_secs": 3601}),
        json!({"memory_limit_mib": 1}),
        json!({"env": {"A=B": "c"}}),
        json!({"env": {"A": "x".repeat(70_000)}}),
    ] {
        let mut body = json!({"snapshot_tag": "base"});
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let answer = world.post("/v1/sandboxes", body).await;
        assert_eq!(answer.refusal(400), "invalid_argument", "{change}");
    }
    let nobody = world
        .post("/v1/sandboxes", json!({"snapshot_tag": "nobody"}))
        .await;
    assert_eq!(nobody.refusal(404), "not_found");
    assert_eq!(world.get("/v1/sandboxes").await.expect(200), json!([]));
    world.close().await;
}

#[tokio::test]
async fn one_failure_undoes_all_unless_partial_results_are_asked_for() {
    let world = World::new().await;
    world.snapshot("base").await;
    world.fail_every_second_fork();
    let answer = world
        .post("/v1/sandboxes", json!({"snapshot_tag": "base", "n": 4}))
        .await;
    assert_eq!(answer.refusal(500), "internal");
    assert_eq!(world.get("/v1/sandboxes").await.expect(200), json!([]));

    let body = json!({"snapshot_tag": "base", "n": 4, "partial": true});
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    let made = made["sandboxes"].as_array().unwrap();
    assert_eq!(made.len(), 4);
    let (failed, running): (Vec<&Value>, _) =
        made.iter().partition(|made| made["code"].is_string());
    assert_eq!((failed.len(), running.len()), (2, 2), "{made:?}");
    assert!(
        failed
            .iter()
            .all(|made| made["code"] == "internal" && made["error"].is_string())
    );
    assert!(running.iter().all(|made| made["state"] == "running"));
    assert_eq!(
        world
            .get("/v1/sandboxes")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        2
    );
    world.close().await;
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let world = World::new().await;
    world.snapshot("base").await;
    world.snapshot("other").await;
    for (tag, n, team) in [("base", 3, "red"), ("base", 2, "blue"), ("other", 1, "red")] {
        let body = json!({"snapshot_tag": tag, "n": n, "metadata": {"team": team, "x": "1"}});
        world.post("/v1/sandboxes", body).await.expect(201);
    }
    let count = async |query: &str| {
        let list = world
            .get(&format!("/v1/sandboxes?{query}"))
            .await
            .expect(200);
        list.as_array().unwrap().len()
    };
    assert_eq!(count("tag=base").await, 5);
    assert_eq!(count("metadata=team%3Dred").await, 4);
    assert_eq!(count("tag=base&metadata=team%3Dred,x%3D1").await, 3);
    assert_eq!(count("status=running").await, 6);
    assert_eq!(count("status=paused").await, 0);

    let mut seen = vec![];
    let mut query = "limit=4".to_owned();
    loop {
        let answer = world.get(&format!("/v1/sandboxes?{query}")).await;
        let next = answer
            .headers
            .get("forkd-next")
            .map(|v| v.to_str().unwrap().to_owned());
        seen.extend(answer.expect(200).as_array().unwrap().iter().map(id));
        let Some(next) = next else { break };
        query = format!("limit=4&after={next}");
    }
    let mut distinct = seen.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!((seen.len(), distinct.len()), (6, 6));
    for query in [
        "limit=0",
        "limit=x",
        "status=odd",
        "after=junk",
        "metadata=novalue",
        "tag=../x",
    ] {
        let answer = world.get(&format!("/v1/sandboxes?{query}")).await;
        assert_eq!(answer.refusal(400), "invalid_argument", "{query}");
    }
    world.close().await;
}

#[tokio::test]
async fn a_sandbox_is_killed_when_its_time_is_up() {
    let world = World::new().await;
    world.snapshot("base").await;
    let body = json!({"snapshot_tag": "base", "timeout_secs": 1});
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    assert!(made[0]["deadline_unix"].as_u64().is_some());
    let path = format!("/v1/sandboxes/{}", id(&made[0]));
    until("the sandbox ends", async || {
        world.get(&path).await.expect(200)["state"] == "ended"
    })
    .await;
    let ended = world.get(&path).await.expect(200);
    assert!(ended["ended"].as_str().unwrap().len() > 3, "{ended}");
    world.close().await;
}

#[tokio::test]
async fn a_vm_that_dies_is_noticed_and_says_why() {
    let world = World::new().await;
    world.snapshot("base").await;
    let made = world.fork("base", 1).await;
    let pid = made[0]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let path = format!("/v1/sandboxes/{}", id(&made[0]));
    until("the death is noticed", async || {
        world.get(&path).await.expect(200)["state"] == "ended"
    })
    .await;
    let ended = world.get(&path).await.expect(200);
    assert!(
        ended["ended"].as_str().unwrap().contains("signal"),
        "{ended}"
    );
    assert_eq!(world.get("/v1/sandboxes").await.expect(200), json!([]));
    let listed = world.get("/v1/sandboxes?status=ended").await.expect(200);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let exec = world
        .post(&format!("{path}/exec"), json!({"args": ["true"]}))
        .await;
    assert_eq!(exec.refusal(409), "not_ready");
    world.close().await;
}

#[tokio::test]
async fn paused_sandboxes_refuse_work_until_they_go_on() {
    let world = World::new().await;
    let path = format!("/v1/sandboxes/{}", world.sandbox().await);
    assert_eq!(
        world
            .post(&format!("{path}/pause"), Value::Null)
            .await
            .expect(200)["state"],
        "paused"
    );
    let exec = world
        .post(&format!("{path}/exec"), json!({"args": ["true"]}))
        .await;
    assert_eq!(exec.refusal(409), "not_ready");
    assert_eq!(
        world
            .post(&format!("{path}/resume"), Value::Null)
            .await
            .expect(200)["state"],
        "running"
    );
    let exec = world
        .post(&format!("{path}/exec"), json!({"args": ["true"]}))
        .await;
    assert_eq!(exec.expect(200)["exit_code"], 0);
    let memory = world.get(&format!("{path}/memory")).await.expect(200);
    assert!(memory["pss_kib"].as_u64().unwrap() > 0);
    world.close().await;
}

#[tokio::test]
async fn branches_in_every_mode() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/branch");
    let full = world.post(&path, json!({"tag": "full"})).await.expect(201);
    assert_eq!(full["layered"], false);
    assert_eq!(
        (&full["pause_ms"], &full["pause_us"]),
        (&json!(1), &json!(550))
    );
    assert_eq!(full["branched_from"], json!(sandbox));
    let diff = world
        .post(
            &path,
            json!({"tag": "d1", "diff": true, "parent_tag": "base"}),
        )
        .await;
    let diff = diff.expect(201);
    assert_eq!(diff["layered"], true);
    assert!(
        diff["diff_physical_bytes"].as_u64().is_some() && diff["diff_ms"].is_u64(),
        "{diff}"
    );
    world
        .post(&path, json!({"tag": "l1", "mode": "live"}))
        .await
        .expect(201);
    let later = world
        .post(&path, json!({"tag": "l2", "mode": "live", "wait": false}))
        .await;
    later.expect(202);
    let named = world
        .send(request(Method::POST, &path, Value::Null))
        .await
        .expect(201);
    assert!(!named["tag"].as_str().unwrap().is_empty());
    let source = world
        .get(&format!("/v1/sandboxes/{sandbox}"))
        .await
        .expect(200);
    assert_eq!(source["has_branched"], true);
    assert_eq!(source["branch_count"], 5);
    assert_eq!(source["state"], "running");
    let lineage = world.get("/v1/lineage").await.expect(200);
    assert_eq!(lineage["snapshots"].as_array().unwrap().len(), 6);
    assert_eq!(world.fork("d1", 2).await.len(), 2);
    world.close().await;
}

#[tokio::test]
async fn branch_requests_that_do_not_fit_are_refused() {
    let world = World::new().await;
    let path = format!("/v1/sandboxes/{}/branch", world.sandbox().await);
    for body in [
        json!({"tag": "../x"}),
        json!({"mode": "diff", "diff": true}),
        json!({"mode": "full", "live": true}),
        json!({"diff": true, "live": true}),
        json!({"diff": true, "measure_diff": true}),
        json!({"wait": false}),
        json!({"wait": false, "mode": "diff"}),
        json!({"mode": "odd"}),
        json!({"parent_tag": "base"}),
        json!({"mode": "diff", "parent_tag": "another"}),
    ] {
        let answer = world.post(&path, body.clone()).await;
        assert_eq!(answer.refusal(400), "invalid_argument", "{body}");
    }
    let taken = world.post(&path, json!({"tag": "base"})).await;
    assert_eq!(taken.refusal(409), "already_exists");
    let nobody = world.post("/v1/sandboxes/nobody/branch", json!({})).await;
    assert_eq!(nobody.refusal(404), "not_found");
    world.close().await;
}

#[tokio::test]
async fn repeated_requests_with_a_key_are_done_once() {
    let world = World::new().await;
    world.snapshot("base").await;
    let send = async |key: &str, n: u32| {
        let body = json!({"snapshot_tag": "base", "n": n});
        let mut request = request(Method::POST, "/v1/sandboxes", body);
        request
            .headers_mut()
            .insert("idempotency-key", key.parse().unwrap());
        world.send(request).await
    };
    let (first, second) = tokio::join!(send("k1", 2), send("k1", 2));
    let replayed = [&first, &second].map(|answer| answer.headers.contains_key("forkd-replayed"));
    assert_eq!(replayed.iter().filter(|replayed| **replayed).count(), 1);
    assert_eq!(first.expect(201), second.expect(201));
    assert_eq!(send("k1", 3).await.refusal(409), "already_exists");
    assert_eq!(send("", 1).await.refusal(400), "invalid_argument");
    send("k2", 1).await.expect(201);
    assert_eq!(
        world
            .get("/v1/sandboxes")
            .await
            .expect(200)
            .as_array()
            .unwrap()
            .len(),
        3
    );
    world.close().await;
}

#[tokio::test]
async fn keys_outlive_the_daemon() {
    let mut world = World::new().await;
    world.snapshot("base").await;
    let keyed = |body| {
        let mut request = request(Method::POST, "/v1/sandboxes", body);
        let key = "across a restart".parse().unwrap();
        request.headers_mut().insert("idempotency-key", key);
        request
    };
    let fork = |n| json!({"snapshot_tag": "base", "n": n});
    let first = world.send(keyed(fork(2))).await.expect(201);
    let refused = keyed(json!({"snapshot_tag": "nothing"}));
    assert_eq!(world.send(refused).await.refusal(409), "already_exists");
    world.restart().await;
    let second = world.send(keyed(fork(2))).await;
    assert_eq!(second.headers["forkd-replayed"], "true");
    assert_eq!(second.expect(201), first);
    assert_eq!(
        world.send(keyed(fork(1))).await.refusal(409),
        "already_exists"
    );
    let listed = world.get("/v1/sandboxes").await.expect(200);
    assert_eq!(listed.as_array().unwrap().len(), 2);
    world.close().await;
}

#[tokio::test]
async fn sandboxes_outlive_the_daemon_and_answer_the_next_one() {
    let mut world = World::new().await;
    let id = world.sandbox().await;
    let path = format!("/v1/sandboxes/{id}");
    let before = world.get(&path).await.expect(200);
    world.restart().await;
    let after = world.get(&path).await.expect(200);
    assert_eq!(
        (&after["pid"], &after["state"]),
        (&before["pid"], &json!("running"))
    );
    let exec = world
        .post(&format!("{path}/exec"), json!({"args": ["echo", "hi"]}))
        .await;
    assert_eq!(exec.expect(200)["stdout"], "hi\n");
    world.delete(&path).await.expect(204);
    world.close().await;
}

#[tokio::test]
async fn branches_beyond_the_limit_are_refused_and_can_be_tried_again() {
    let world = World::with(|options| options.branch_concurrency = 1).await;
    world.snapshot("base").await;
    let made = world.fork("base", 2).await;
    let branch = |i: usize, tag: &str| {
        let path = format!("/v1/sandboxes/{}/branch", id(&made[i]));
        let (router, body) = (world.router.clone(), json!({"tag": tag}));
        async move {
            let request = crate::world::request(http::Method::POST, &path, body);
            let response = tower::ServiceExt::oneshot(router, request).await.unwrap();
            let (parts, body) = response.into_parts();
            let body = http_body_util::BodyExt::collect(body).await.unwrap();
            (
                parts.status.as_u16(),
                String::from_utf8(body.to_bytes().to_vec()).unwrap(),
            )
        }
    };
    let held = world.engine.saves.lock().await;
    let first = tokio::spawn(branch(0, "first"));
    crate::world::until("the first is under way", async || {
        let text = world.get("/metrics").await.text();
        text.contains("forkd_branches_in_flight 1")
    })
    .await;
    let (status, text) = branch(1, "second").await;
    assert_eq!(status, 503, "{text}");
    assert!(
        text.contains("\"busy\"") && text.contains("--branch-concurrency"),
        "{text}"
    );
    drop(held);
    assert_eq!(first.await.unwrap().0, 201);
    let (status, text) = branch(1, "second").await;
    assert_eq!(status, 201, "{text}");
    world.close().await;
}

#[tokio::test]
async fn what_ended_a_sandbox_and_what_is_not_enforced_is_told() {
    let world = World::new().await;
    world.snapshot("base").await;
    let body = json!({"snapshot_tag": "base", "memory_limit_mib": 256, "timeout_secs": 1});
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    assert_eq!(made[0]["not_enforced"], json!(["memory_limit_mib"]));
    assert_eq!(made[0]["ending"], Value::Null);
    let path = format!("/v1/sandboxes/{}", id(&made[0]));
    crate::world::until("its time is up", async || {
        world.get(&path).await.expect(200)["state"] == "ended"
    })
    .await;
    assert_eq!(world.get(&path).await.expect(200)["ending"], "timed_out");

    let unlimited = &world.fork("base", 1).await[0];
    assert_eq!(unlimited["not_enforced"], Value::Null);
    let path = format!("/v1/sandboxes/{}", id(unlimited));
    let pid = unlimited["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    crate::world::until("its end", async || {
        world.get(&path).await.expect(200)["state"] == "ended"
    })
    .await;
    assert_eq!(world.get(&path).await.expect(200)["ending"], "exited");
    world.close().await;
}

#[tokio::test]
async fn every_limit_is_told_also_after_a_restart() {
    let mut world = World::new().await;
    world.snapshot("base").await;
    let io = json!({"read_bytes_per_sec": 1 << 20, "write_iops": 10});
    let body = json!({
        "snapshot_tag": "base", "cpu_limit_milli": 250, "pids_limit": 100, "io_limit": io,
    });
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    let path = format!("/v1/sandboxes/{}", id(&made[0]));
    for _ in 0..2 {
        let told = world.get(&path).await.expect(200);
        assert_eq!(told["cpu_limit_milli"], 250);
        assert_eq!(told["pids_limit"], 100);
        assert_eq!(told["io_limit"], io);
        // This node has no control groups.
        let missed = json!(["cpu_limit_milli", "pids_limit", "io_limit"]);
        assert_eq!(told["not_enforced"], missed);
        world.restart().await;
    }
    for (field, value) in [
        ("pids_limit", json!(1)),
        ("io_limit", json!({"write_bytes_per_sec": 1})),
    ] {
        let mut body = json!({"snapshot_tag": "base"});
        body[field] = value;
        let refused = world.post("/v1/sandboxes", body).await;
        assert_eq!(refused.refusal(400), "invalid_argument");
    }
    world.close().await;
}
