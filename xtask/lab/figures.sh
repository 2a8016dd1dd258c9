#!/bin/sh
# Figures of the engines side by side, with the same image and a real Linux guest: run it with
#   cargo xtask lab --data target/test-data --script xtask/lab/figures.sh
# Times are those of an emulated node; only their ratios mean something.
set -u
images=/tmp/images
mkdir -p $images /tmp/upper /tmp/work
busybox mount -t overlay -o lowerdir=/lab/in/images,upperdir=/tmp/upper,workdir=/tmp/work overlay $images
export FORKD_AGENT=/lab/in/forkd-agent FORKD_IMAGE_ROOT=$images
ulimit -n 4096

number() { sed -n "s/^ *\"$1\": *\([0-9.]*\),*$/\1/p" | head -1; }

measure() {
    export FORKD_ENGINE=$1 FORKD_DATA_DIR=/var/lib/forkd-$1 FORKD_RUN_DIR=/run/forkd-$1
    unset FORKD_URL
    forkd serve > /out/serve-$1.log 2>&1 &
    daemon=$!
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        forkd ls > /dev/null 2>&1 && break
        sleep 1
    done
    forkd snapshot --tag base --image python3-numpy --json > /out/snapshot-$1.json || return 1
    echo "figure $1 boot_to_ready_ms $(number boot_ms < /out/snapshot-$1.json)"
    echo "figure $1 save_ms $(number save_ms < /out/snapshot-$1.json)"
    forkd bench --tag base --n 5 --json > /out/bench-$1.json || return 1
    FORKD_URL= forkd bench --tag base --n 5 | sed "s/^/figure $1 /"
    for round in 1 2 3; do
        forkd fork --tag base -n 10 --json > /out/ten-$1-$round.json || return 1
        # The figures of all ten stand after those of each.
        echo "figure $1 fork_of_ten" $(grep -E '"(template|forked|ready)_ms"' /out/ten-$1-$round.json | tail -3)
        forkd kill --all > /dev/null
    done
    id=$(forkd fork --tag base -n 1) || return 1
    forkd exec "$id" -- sh -c 'dd if=/dev/urandom of=/tmp/dirty bs=1M count=8 2>/dev/null'
    for try in 1 2 3; do
        forkd branch "$id" --tag "b$try" --json > /out/branch-$1-$try.json || return 1
        echo "figure $1 branch pause_us $(number pause_us < /out/branch-$1-$try.json)" \
            "until_written_ms $(number diff_ms < /out/branch-$1-$try.json)"
        forkd fork --tag "b$try" -n 1 --json > /out/fork-$1-$try.json || return 1
        echo "figure $1 fork_of_branch template_ms $(number template_ms < /out/fork-$1-$try.json)" \
            "ready_ms $(number ready_ms < /out/fork-$1-$try.json)"
    done
    forkd kill --all > /dev/null
    kill $daemon
    wait $daemon
}

bad=0
for engine in kvm qemu; do
    if measure $engine; then echo "PASS figures $engine"; else echo "FAIL figures $engine"; bad=1; fi
done
exit $bad
