//! Snapshots.

use http::Method;
use serde_json::{Value, json};

use crate::world::{World, request};

#[tokio::test]
async fn made_listed_told_about_and_removed() {
    let world = World::new().await;
    assert_eq!(world.get("/v1/snapshots").await.expect(200), json!([]));
    let made = world.snapshot("base").await;
    assert_eq!(made["tag"], "base");
    assert_eq!(made["status"], "ready");
    assert_eq!(made["bootable"], true);
    assert!(made["stages"]["boot_ms"].as_f64().unwrap() > 0.0, "{made}");
    assert!(made["created_at_unix"].as_u64().unwrap() > 0);
    assert!(made["dir"].as_str().unwrap().ends_with("base"));

    let listed = world.get("/v1/snapshots").await.expect(200);
    assert_eq!(listed[0]["tag"], "base");
    let detail = world.get("/v1/snapshots/base/info").await.expect(200);
    assert_eq!(detail["chain_depth"], 0);
    assert_eq!(detail["memory_logical_bytes"], 64 << 20);
    assert!(detail["vmstate_bytes"].as_u64().unwrap() > 0, "{detail}");

    world.delete("/v1/snapshots/base").await.expect(204);
    assert_eq!(
        world.delete("/v1/snapshots/base").await.refusal(404),
        "not_found"
    );
    assert_eq!(
        world.get("/v1/snapshots/base/info").await.refusal(404),
        "not_found"
    );
    world.close().await;
}

#[tokio::test]
async fn steps_are_streamed() {
    let world = World::new().await;
    let path = "/v1/snapshots?progress=true";
    let answer = world
        .call(Method::POST, path, world.snapshot_body("base"))
        .await;
    assert_eq!(answer.status, 200);
    let text = answer.text();
    let step = text.find("\"booting\"").unwrap();
    let publish = text.find("\"publishing\"").unwrap();
    let result = text.find("event: result").unwrap();
    assert!(step < publish && publish < result, "{text}");

    let mut request = request(Method::POST, "/v1/snapshots", world.snapshot_body("base"));
    request
        .headers_mut()
        .insert("accept", "text/event-stream".parse().unwrap());
    let text = world.send(request).await.text();
    assert!(
        text.contains("event: error") && text.contains("already_exists"),
        "{text}"
    );
    world.close().await;
}

#[tokio::test]
async fn requests_that_do_not_fit_are_refused() {
    let world = World::new().await;
    world.snapshot("base").await;
    let post = async |change: Value| {
        let mut body = world.snapshot_body("other");
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        world.post("/v1/snapshots", body).await
    };
    assert_eq!(
        post(json!({"tag": "base"})).await.refusal(409),
        "already_exists"
    );
    for change in [
        json!({"tag": "../evil"}),
        json!({"tag": ""}),
        json!({"kernel": "/nowhere/kernel"}),
        json!({"kernel": "relative"}),
        json!({"rootfs": null}),
        json!({"initramfs": null}),
        json!({"memory_mib": 1}),
        json!({"vcpus": 33}),
        json!({"boot_wait_secs": 61}),
        json!({"warm": "1", "warm_cmd": "true"}),
        json!({"image": "also"}),
        json!({"kernel": null, "rootfs": null, "initramfs": null}),
    ] {
        assert_eq!(
            post(change.clone()).await.refusal(400),
            "invalid_argument",
            "{change}"
        );
    }
    let unknown = json!({"tag": "x", "image": "nobody-built-this"});
    assert_eq!(
        world.post("/v1/snapshots", unknown).await.refusal(404),
        "not_found"
    );
    world.close().await;
}

#[tokio::test]
async fn what_depends_on_a_snapshot_protects_it() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/branch");
    world
        .post(&path, json!({"tag": "child", "mode": "diff"}))
        .await
        .expect(201);

    let refused = world.delete("/v1/snapshots/base").await;
    let text = refused.text();
    assert_eq!(refused.refusal(409), "in_use");
    assert!(text.contains("child") || text.contains(&sandbox), "{text}");
    let both = world
        .delete("/v1/snapshots/base?cascade=true&force=true")
        .await;
    assert_eq!(both.refusal(400), "invalid_argument");

    let detail = world.get("/v1/snapshots/child/info").await.expect(200);
    assert_eq!(detail["ancestors"], json!(["base"]));
    assert_eq!(detail["parent_tag"], "base");
    assert_eq!(detail["snapshot"]["branched_from"], json!(sandbox));
    let base = world.get("/v1/snapshots/base/info").await.expect(200);
    assert_eq!(base["dependents"], json!(["child"]));
    assert_eq!(base["sandboxes"], json!([sandbox]));

    world
        .delete("/v1/snapshots/base?cascade=true")
        .await
        .expect(204);
    assert_eq!(world.get("/v1/snapshots").await.expect(200), json!([]));
    assert_eq!(world.get("/v1/sandboxes").await.expect(200), json!([]));
    world.close().await;
}

#[tokio::test]
async fn a_compacted_snapshot_stands_alone() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/branch");
    world
        .post(&path, json!({"tag": "child", "mode": "diff"}))
        .await
        .expect(201);
    let flat = world
        .post("/v1/snapshots/child/compact", json!({"to": "flat"}))
        .await
        .expect(200);
    assert_eq!(flat["branched_from"], "compact:child");
    let detail = world.get("/v1/snapshots/flat/info").await.expect(200);
    assert_eq!(detail["snapshot"]["layered"], false, "{detail}");
    let again = world
        .post("/v1/snapshots/child/compact", json!({"to": "flat"}))
        .await;
    assert_eq!(again.refusal(409), "already_exists");
    let same = world
        .post("/v1/snapshots/child/compact", json!({"to": "child"}))
        .await;
    assert_eq!(same.refusal(400), "invalid_argument");
    world.close().await;
}

/// Puts an image of this kernel into the store, as `forkd image build` leaves it.
fn store_image(store: &std::path::Path, kernel: &str) {
    let digest = |letter: char| letter.to_string().repeat(64);
    for (part, letter, file, content) in [
        ("kernel", 'a', "vmlinuz", kernel),
        ("initramfs", 'b', "initramfs.cpio", "agent"),
        ("rootfs", 'c', "rootfs.erofs", "root"),
    ] {
        let blob = store.join(format!("blobs/{part}-{}", digest(letter)));
        std::fs::create_dir_all(&blob).unwrap();
        std::fs::write(blob.join(file), content).unwrap();
        let entry = json!({"size_bytes": content.len(), "blake3": blake3::hash(content.as_bytes()).to_string()});
        let manifest = json!({"files": {file: entry}});
        std::fs::write(blob.join("blob.json"), manifest.to_string()).unwrap();
    }
    let record = json!({"schema_version": 1, "name": "stored", "digest": digest('d'), "kernel": digest('a'),
        "initramfs": digest('b'), "rootfs": digest('c'), "kernel_version": "6.1", "kernel_origin": "test",
        "source": "test", "created_at": 1});
    let dir = store.join("images/stored");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("image.json"), record.to_string()).unwrap();
}

#[tokio::test]
async fn a_kernel_of_an_image_brings_its_initramfs() {
    let world = World::new().await;
    let mut body = world.snapshot_body("older-client");
    body["initramfs"] = Value::Null;
    let refused = world.post("/v1/snapshots", body.clone()).await;
    assert_eq!(refused.refusal(400), "invalid_argument");
    // The world's own kernel has its name for content.
    store_image(&world.paths.images, "another");
    let refused = world.post("/v1/snapshots", body.clone()).await;
    assert_eq!(refused.refusal(400), "invalid_argument");
    store_image(&world.paths.images, "kernel");
    world.post("/v1/snapshots", body).await.expect(201);
    world.fork("older-client", 1).await;
    world.close().await;
}
