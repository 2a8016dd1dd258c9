#!/bin/bash
# Builds the image of the Dockerfile with buildah, and runs it with the arguments of the Pod: doctor, an image of a
# guest, a snapshot, three sandboxes. Needs root, no registry and no Docker: the base is made of Debian's packages, and
# the programs are taken from DIR, where the stage "build" would have built them.
#
#     packaging/docker/test.sh DIR AGENT          make image-test does it all
set -euo pipefail

programs=$(realpath "$1") agent=$(realpath "$2")
cd "$(dirname "$0")/../.."
export work=$(mktemp -d "${TMPDIR:-/tmp}/forkd-image-test.XXXXXX")
buildah=(buildah --root "$work/storage" --runroot "$work/runroot" --storage-driver vfs)
trap '"${buildah[@]}" umount --all >/dev/null 2>&1; rm -rf --one-file-system "$work"' EXIT

step() { echo "== $*"; }

step "the base"
mmdebstrap --quiet --variant=apt --include=ca-certificates bookworm "$work/base.tar"
base=$("${buildah[@]}" from scratch)
"${buildah[@]}" add -q "$base" "$work/base.tar" / >/dev/null
# This machine's way to Debian's packages.
"${buildah[@]}" add -q "$base" /etc/apt /etc/apt >/dev/null
"${buildah[@]}" commit -q --rm "$base" docker.io/library/debian:bookworm-slim >/dev/null
rm "$work/base.tar"

step "the image"
built=$work/built/src/target
install -D -t "$built/release" "$programs"/{forkd-controller,forkd}
install -D -t "$built/x86_64-unknown-linux-gnu/monitor" "$programs/forkd-vmm"
install -D -t "$built/x86_64-unknown-linux-gnu/guest" "$agent"
"${buildah[@]}" bud -q --isolation chroot --network host --pull-never --build-context "build=$work/built" \
    -f packaging/docker/Dockerfile -t forkd-controller . >"$work/bud.log" 2>&1 || { tail -30 "$work/bud.log"; exit 1; }

step "a container"
container=$("${buildah[@]}" from --pull-never localhost/forkd-controller)
export root=$("${buildah[@]}" mount "$container")
export args=$(sed -n '/ args:/,/ ports:/s/^ *- \(--.*\)/\1/p' packaging/k8s/forkd-controller.yaml | tr '\n' ' ')
export env=$("${buildah[@]}" inspect --format '{{range .OCIv1.Config.Env}}{{.}} {{end}}' "$container")

# What the manifest mounts, in namespaces that end with the test.
unshare --mount --pid --fork --ipc --uts --kill-child bash -euo pipefail <<'INSIDE'
export token=a-token-that-is-long-enough url=http://127.0.0.1:8889
mount --make-rprivate /
# The root of a container is a mount of its own.
mount --bind "$root" "$root"
mkdir -p "$root"/{dev,sys,proc,run,etc/forkd,var/lib/forkd}
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount -t tmpfs run "$root/run"
mount -t tmpfs state "$root/var/lib/forkd"
install -D -m 400 <(printf %s "$token") "$root/etc/forkd/token"
cp /etc/resolv.conf "$root/etc/resolv.conf"
inside() { env -i $env FORKD_TOKEN=$token chroot "$root" "$@"; }
export -f inside

inside forkd doctor
inside forkd --daemon-url none image build --debian python3-minimal --name py >"$work/build.log" 2>&1 || {
    tail -20 "$work/build.log"; exit 1; }

# The daemon's port and the sandboxes' networks are in a namespace of their own, as a Pod's are.
unshare --net bash -euo pipefail <<'SERVE'
ip link set lo up
env -i $env chroot "$root" forkd-controller serve $args 2>"$work/serve.log" &
daemon=$!
# Whatever fails says so with the daemon's own words.
trap 'status=$?; [ $status -eq 0 ] || tail -20 "$work/serve.log"; exit $status' EXIT
for _ in $(seq 200); do
    inside forkd --daemon-url $url ls >/dev/null 2>&1 && break
    kill -0 $daemon
    sleep 0.3
done
ask() { inside python3 -c '
import json, os, sys, urllib.request
method, path, body = sys.argv[1:]
head = {"authorization": "Bearer " + os.environ["FORKD_TOKEN"], "content-type": "application/json"}
call = urllib.request.Request("http://127.0.0.1:8889" + path, body.encode(), head, method=method)
print(urllib.request.urlopen(call, timeout=600).read().decode())' "$@"; }
ask POST /v1/snapshots '{"tag": "py", "image": "py", "memory_mib": 256}' >/dev/null
made=$(ask POST /v1/sandboxes '{"snapshot_tag": "py", "n": 3}')
ids=$(grep -oE '"id":"[^"]+"' <<<"$made" | cut -d'"' -f4)
[ "$(wc -w <<<$ids)" -eq 3 ]
for id in $ids; do
    ask POST "/v1/sandboxes/$id/exec" '{"args": ["python3", "-c", "print(6*7)"]}' | grep -q '"stdout":"42\\n"'
    echo "$id answers"
done
kill -TERM $daemon
wait $daemon
# Nothing is left of the sandboxes.
! grep -hE '^(forkd|qemu)' "$root"/proc/[0-9]*/comm
SERVE
INSIDE
step "passed"
