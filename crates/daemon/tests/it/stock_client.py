"""Drives a daemon with the stock client of forkd 0.5, every method of it."""

import json
import os
import sys
import urllib.request

from forkd.controller import Controller, ControllerError

directory = sys.argv[1]
calls = 0


def called(value):
    global calls
    calls += 1
    return value


# The client cannot make snapshots.
body = {"tag": "base", "memory_mib": 64, "kernel": f"{directory}/kernel",
        "initramfs": f"{directory}/initramfs", "rootfs": f"{directory}/rootfs"}
request = urllib.request.Request(
    os.environ["FORKD_URL"] + "/v1/snapshots", json.dumps(body).encode(),
    {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["FORKD_TOKEN"]})
assert urllib.request.urlopen(request).status == 201

client = Controller()
assert [s["tag"] for s in called(client.list_snapshots())] == ["base"]
made = called(client.spawn_sandboxes("base", n=2, per_child_netns=True, live_fork=True, prewarm=True))
assert len(made) == 2 and made[0]["guest_addr"] == "10.42.0.2:8888", made
for field in ("id", "snapshot_tag", "netns", "created_at_unix", "pid", "memory_limit_mib",
              "has_branched", "last_branch_memory_path", "branch_count"):
    assert field in made[0], field
sandbox = made[0]["id"]
assert len(called(client.list_sandboxes())) == 2
assert called(client.get_sandbox(sandbox))["id"] == sandbox
assert called(client.ping_sandbox(sandbox))["pong"] is True
done = called(client.exec_command(sandbox, ["sh", "-c", "echo out; exit 3"]))
assert (done["stdout"], done["stderr"], done["exit_code"]) == ("out\n", "", 3), done
done = called(client.eval_code(sandbox, "20 + 1"))
assert (done["result"], done["error"], done["exit_code"]) == ("21", None, 0), done
branch = called(client.branch_sandbox(sandbox, tag="checkpoint", diff=True))
assert branch["branched_from"] == sandbox and branch["status"] == "ready", branch
assert called(client.branch_sandbox(sandbox, tag="live", mode="live"))["pause_ms"] >= 1
assert called(client.branch_sandbox(sandbox, measure_diff=True))["tag"]
for wrong, status in [(lambda: client.get_sandbox("nobody"), 404),
                      (lambda: client.spawn_sandboxes("nobody"), 404),
                      (lambda: client.branch_sandbox(sandbox, tag="live"), 409),
                      (lambda: client.branch_sandbox(sandbox, diff=True, measure_diff=True), 400)]:
    try:
        wrong()
    except ControllerError as error:
        assert error.status == status and error.body["error"], error
    else:
        raise AssertionError(f"no error, {status} was due")
grandchildren = called(client.spawn_sandboxes("checkpoint", n=3))
for made in client.list_sandboxes():
    assert client.kill_sandbox(made["id"]) is None
called(client.list_sandboxes())
assert client.list_sandboxes() == [], grandchildren
called(client.delete_snapshot("live"))
try:
    Controller(token="not-the-token").list_snapshots()
except ControllerError as error:
    called(error.status == 401 or sys.exit("401 was due"))
print(json.dumps({"calls": calls}))
