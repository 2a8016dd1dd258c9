//! The network of real guests: beyond the tap of each is a network namespace with an echo server.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use forkd_engine::{ForkSpec, SlotHandles, Template, Vm};
use forkd_host::net::netns::{self, Netns};
use forkd_host::net::route::Route;
use forkd_host::net::tap;
use forkd_sandbox::guest::{Client, ExecRequest};
use forkd_wire::agent::{GuestNetwork, GuestNetwork6, ResumeRequest};

use crate::guest::{boot_with, files, resume};
use crate::world::PATIENCE;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: u16 = 7;
/// Keeps a connection busy, and writes down when it has ended.
const TALK: &str = "exec 3<>/dev/tcp/10.42.0.1/7 && while echo ping >&3 && read -t 20 -u 3 line; \
                    do echo $line > /tmp/talk; sleep 0.1; done; echo gone > /tmp/ended";

/// A namespace like a slot's, which tells its letter before every line that it sends back.
struct Beyond {
    netns: Netns,
    tap: OwnedFd,
}

impl Beyond {
    fn make(letter: char) -> Beyond {
        let name = format!("forkd-test-{}-{letter}", std::process::id());
        let netns = Netns::create(&name).unwrap();
        let made = netns.enter(|| {
            let tap = tap::open("forkd-tap0").unwrap();
            let mut route = Route::open().unwrap();
            route.set_mac("forkd-tap0", GATEWAY_MAC).unwrap();
            let address = IpAddr::V4(GATEWAY);
            route.add_address("forkd-tap0", address, 24).unwrap();
            let address = IpAddr::V6(GATEWAY6);
            route.add_address("forkd-tap0", address, 64).unwrap();
            route.set_up("forkd-tap0").unwrap();
            let listeners = [IpAddr::V4(GATEWAY), IpAddr::V6(GATEWAY6)]
                .map(|address| TcpListener::bind((address, PORT)).unwrap());
            (tap, listeners)
        });
        let (tap, listeners) = made.unwrap();
        for listener in listeners {
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || {
                        let mut lines = BufReader::new(&stream).lines();
                        while let Some(Ok(line)) = lines.next() {
                            if writeln!(&stream, "{letter}: {line}").is_err() {
                                break;
                            }
                        }
                    });
                }
            });
        }
        Beyond { netns, tap }
    }

    fn slot(&self) -> SlotHandles {
        SlotHandles {
            tap: Some(self.tap.as_fd().try_clone_to_owned().unwrap()),
            netns: Some(self.netns.as_fd().try_clone_to_owned().unwrap()),
            ..SlotHandles::NONE
        }
    }
}

impl Drop for Beyond {
    fn drop(&mut self) {
        let _ = netns::delete(self.netns.name());
    }
}

fn connected(index: u32) -> ResumeRequest {
    ResumeRequest {
        network: Some(GuestNetwork {
            address: "10.42.0.2/24".to_owned(),
            gateway: GATEWAY.to_string(),
            dns: vec![GATEWAY.to_string()],
            mac: Some("02:f0:4b:00:00:02".to_owned()),
            // All forks' gateways have it, so they keep what their parent has set up.
            gateway_mac: Some("02:00:00:00:00:01".to_owned()),
            v6: Some(GuestNetwork6 {
                address: "fd00::2/64".to_owned(),
                gateway: GATEWAY6.to_string(),
            }),
        }),
        ..resume(index)
    }
}

async fn fork(template: &Arc<dyn Template>, spec: ForkSpec, request: &ResumeRequest) -> Fork {
    let vm = template.fork(vec![spec]).await.remove(0).unwrap();
    let client = Client::new(Arc::clone(&vm));
    client.resume(request, PATIENCE).await.unwrap();
    Fork { vm, client }
}

struct Fork {
    vm: Arc<dyn Vm>,
    client: Client,
}

/// Runs a line in a guest's bash. Answers its status and what it wrote.
async fn bash(client: &Client, line: &str) -> (i32, String) {
    let request = ExecRequest::new(["bash", "-c", line]);
    let output = client.run(request, 2 * PATIENCE).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.exit_code, text)
}

async fn echo(client: &Client, word: &str) -> (i32, String) {
    echo_from(client, GATEWAY.into(), word).await
}

async fn echo_from(client: &Client, address: IpAddr, word: &str) -> (i32, String) {
    let line = format!(
        "timeout 20 bash -c 'exec 3<>/dev/tcp/{address}/7 && echo {word} >&3 && head -n 1 <&3'"
    );
    bash(client, &line).await
}

#[tokio::test]
async fn forks_reach_what_is_beyond_their_own_taps_and_no_more() {
    let Some(files) = files() else { return };
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make network devices");
        return;
    }
    let (here, there) = (Beyond::make('a'), Beyond::make('b'));
    let parent = boot_with(&files, "", true, Some(here.slot())).await;
    parent.client.health(2 * PATIENCE).await.unwrap();
    parent.client.resume(&connected(0), PATIENCE).await.unwrap();
    assert_eq!(
        echo(&parent.client, "one").await,
        (0, "a: one".to_owned()),
        "{}",
        parent.sh("ls /sys/class/net; cat /proc/net/route").await
    );
    let mut talk = ExecRequest::new(["bash", "-c", TALK]);
    talk.cwd = Some("/tmp".to_owned());
    let _talk = parent.client.start(talk).await.unwrap();
    bash(&parent.client, "until [ -s /tmp/talk ]; do sleep 0.1; done").await;

    let template = parent.template().await;
    let mut spec = parent.fork_spec(1);
    spec.slot = Some(there.slot());
    let child = fork(&template, spec, &connected(1)).await;
    assert_eq!(echo(&child.client, "two").await, (0, "b: two".to_owned()));
    for (client, expected) in [(&parent.client, "a: six"), (&child.client, "b: six")] {
        assert_eq!(
            echo_from(client, GATEWAY6.into(), "six").await,
            (0, expected.to_owned())
        );
    }
    // The connection that the parent had open is none of the child's.
    let ended =
        "for i in $(seq 300); do [ -s /tmp/ended ] && break; sleep 0.1; done; cat /tmp/ended";
    let (_, status) = bash(&child.client, ended).await;
    assert_eq!(status, "gone");
    let (_, last) = bash(&child.client, "cat /tmp/talk").await;
    assert_eq!(
        last, "a: ping",
        "the parent's peer answered, or the child's"
    );

    let alone = fork(&template, parent.fork_spec(2), &resume(2)).await;
    let (status, answer) = echo(&alone.client, "three").await;
    assert!(status != 0 && answer.is_empty(), "{status}: {answer}");

    // The parent never noticed.
    let (_, running) = bash(
        &parent.client,
        "rm /tmp/talk; sleep 2; cat /tmp/talk; ls /tmp",
    )
    .await;
    assert!(running.starts_with("a: ping"), "{running}");
    assert!(!running.contains("ended"), "{running}");
    assert_eq!(
        echo(&parent.client, "four").await,
        (0, "a: four".to_owned())
    );

    // A fork whose slot has version 4 alone keeps nothing of what its parent had.
    child.vm.kill().await.unwrap();
    let mut without = connected(3);
    without.network = without.network.map(|network| GuestNetwork {
        v6: None,
        ..network
    });
    let mut spec = parent.fork_spec(3);
    spec.slot = Some(there.slot());
    let only4 = fork(&template, spec, &without).await;
    assert_eq!(echo(&only4.client, "five").await, (0, "b: five".to_owned()));
    let (_, left) = bash(
        &only4.client,
        "grep -h ^fd00 /proc/net/if_inet6 /proc/net/ipv6_route",
    )
    .await;
    assert_eq!(left, "");

    for vm in [&only4.vm, &alone.vm] {
        vm.kill().await.unwrap();
    }
    template.close().await.unwrap();
}
