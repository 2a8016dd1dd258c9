//! A node that takes on only so much, as its callers see it.

use forkd_sandbox::Admission;
use serde_json::json;

use crate::world::{World, id};

async fn world(change: impl FnOnce(&mut Admission)) -> World {
    let mut admission = Admission::default();
    change(&mut admission);
    World::bounded(admission, |_| {}).await
}

#[tokio::test]
async fn a_full_node_says_so_and_goes_on() {
    let world = world(|bounds| bounds.sandboxes_max = 2).await;
    world.snapshot("base").await;
    let made = world.fork("base", 2).await;
    let body = json!({"snapshot_tag": "base"});
    let refused = world.post("/v1/sandboxes", body.clone()).await;
    assert_eq!(refused.headers["retry-after"], "1");
    let refused = refused.expect(429);
    assert_eq!(refused["code"], "busy");
    assert_eq!(
        refused["error"],
        "no room for 1 forks of base: this node has 2 sandboxes and may have 2, 1 more were asked for"
    );
    assert!(
        refused["remedy"]
            .as_str()
            .unwrap()
            .contains("--max-sandboxes")
    );

    // It serves those it has, so it is ready; what it has no room for stands beside.
    let ready = world.get("/readyz").await.expect(200);
    assert_eq!(ready["ready"], true);
    let room = &ready["room"];
    assert_eq!(
        (&room["sandboxes"], &room["sandboxes_max"]),
        (&json!(2), &json!(2))
    );
    assert!(
        room["full"].as_str().unwrap().contains("may have 2"),
        "{room}"
    );
    assert!(room["memory_available_mib"].as_u64().unwrap() > 0, "{room}");
    assert!(room["disk_available_mib"].as_u64().unwrap() > 0, "{room}");
    assert_eq!(room.get("vcpus_max"), None);

    let text = world.get("/metrics").await.text();
    for line in [
        "forkd_admission_refused_total{resource=\"sandboxes\"} 1",
        "forkd_admission_refused_total{resource=\"memory\"} 0",
        "forkd_admission_bound{resource=\"sandboxes\"} 2",
        "forkd_vcpus 2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }
    // A second look counts nothing twice.
    let again = world.get("/metrics").await.text();
    assert!(again.contains("forkd_admission_refused_total{resource=\"sandboxes\"} 1\n"));

    let path = format!("/v1/sandboxes/{}", id(&made[0]));
    world.delete(&path).await.expect(204);
    world.post("/v1/sandboxes", body).await.expect(201);
    world.close().await;
}

#[tokio::test]
async fn virtual_cpus_of_taken_over_sandboxes_count() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let mut world = world(|bounds| bounds.vcpus_per_cpu = Some(1)).await;
    let mut body = world.snapshot_body("base");
    body["vcpus"] = json!(cpus);
    world.post("/v1/snapshots", body).await.expect(201);
    world.fork("base", 1).await;
    world.restart().await;
    let answer = world
        .post("/v1/sandboxes", json!({"snapshot_tag": "base"}))
        .await;
    assert_eq!(answer.headers["retry-after"], "1");
    let refused = answer.expect(429);
    let said = refused["error"].as_str().unwrap();
    let there = format!("have {cpus} virtual CPUs and may have {cpus}, {cpus} more");
    assert!(said.contains(&there), "{said}");
    world.close().await;
}

#[tokio::test]
async fn memory_that_is_kept_is_not_given() {
    let world = world(|bounds| bounds.memory_reserve_mib = 1 << 40).await;
    let answer = world
        .post("/v1/snapshots", world.snapshot_body("base"))
        .await;
    assert_eq!(answer.headers["retry-after"], "10");
    let refused = answer.expect(507);
    assert_eq!(refused["code"], "insufficient_resources");
    let said = refused["error"].as_str().unwrap();
    assert!(said.contains("the parent of snapshot base"), "{said}");
    assert!(said.contains("64 MiB of memory are needed"), "{said}");
    world.close().await;
}

#[tokio::test]
async fn disk_that_is_kept_is_not_given() {
    let world = world(|bounds| bounds.disk_reserve_mib = 1 << 40).await;
    // A sixteenth of the file system is the most that is kept, so this host may have enough.
    let space = forkd_host::file::space(world.dir.path()).unwrap();
    let answer = world
        .post("/v1/snapshots", world.snapshot_body("base"))
        .await;
    if space.free > space.total / 16 + (1 << 30) {
        answer.expect(201);
        world.fork("base", 1).await;
    } else {
        assert_eq!(answer.refusal(507), "insufficient_resources");
    }
    world.close().await;
}
