# What a user does, with the kvm engine: part of the suite, run in its shell.

# An image store is written to a little even when nothing is built.
data=/var/lib/forkd
mkdir -p $data/images /tmp/upper /tmp/work
busybox mount -t overlay -o lowerdir=/lab/in/images,upperdir=/tmp/upper,workdir=/tmp/work overlay $data/images
export FORKD_AGENT=/lab/in/forkd-agent FORKD_ENGINE=kvm
ulimit -n 4096

# Nothing a user does may hang.
run() { timeout 120 forkd "$@"; }

check() {
    name=$1
    echo "lab: $name after $(cut -d' ' -f1 /proc/uptime) s"
    if "$name"; then
        echo "PASS user $name"
    else
        echo "FAIL user $name"
        tail -40 /out/serve*.log 2>/dev/null
        bad=1
    fi
}

serve() {
    forkd serve > "/out/$1.log" 2>&1 &
    daemon=$!
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        timeout 5 forkd ls > /dev/null 2>&1 && return 0
        sleep 1
    done
    echo "the daemon does not answer"
    return 1
}

monitors() { ps ax -o comm=,args= | grep -c '[f]orkd-vmm'; }

nothing_left() {
    for try in 1 2 3 4 5 6 7 8 9 10; do
        left=$(monitors)
        [ "$left" = 0 ] && [ -z "$(ls /run/forkd 2>/dev/null)" ] && return 0
        sleep 1
    done
    echo "left: $left processes, $(ls /run/forkd)"
    ps ax | grep '[f]orkd-vmm'
    return 1
}

quickstart() {
    [ "$length" = short ] && n=3 || n=10
    FORKD_URL=none timeout 240 forkd quickstart --engine kvm -n $n && nothing_left
}

# auto takes the built-in monitor here.
chooses_kvm() { FORKD_URL=none forkd doctor --engine auto | grep -q '✓ vmm'; }

first= second= third= again= daemon=

# A daemon, a branch that is forked at once and becomes ready, and a branch of its fork.
branches() {
    unset FORKD_URL
    serve serve || return 1
    first=$(run fork --tag quickstart -n 1) || return 1
    run exec "$first" -- sh -c 'echo one > /tmp/level' || return 1
    run branch "$first" --tag b1 --no-wait || return 1
    run images
    run exec "$first" -- sh -c 'echo changed > /tmp/level' || return 1
    second=$(run fork --tag b1 -n 1) || return 1
    [ "$(run exec "$second" -- cat /tmp/level)" = one ] || return 1
    run branch "$second" --tag b2 || return 1
    third=$(run fork --tag b2 -n 1) || return 1
    [ "$(run exec "$third" -- cat /tmp/level)" = one ] || return 1
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        run images | grep -q writing || break
        sleep 1
    done
    run images
    [ "$(run images | grep -c ready)" = 3 ]
}

# kill -9: the next daemon finds what survived, and sweeps what did not.
recovers() {
    kill -9 "$daemon"
    wait "$daemon" 2>/dev/null
    serve serve2 || return 1
    run ls
    [ "$(run exec "$third" -- cat /tmp/level)" = one ] || return 1
    again=$(run fork --tag b2 -n 1) || return 1
    [ "$(run exec "$again" -- cat /tmp/level)" = one ] || return 1
    run kill --all && forkd images
    kill "$daemon" && wait "$daemon"
    nothing_left
}

for name in quickstart chooses_kvm branches recovers; do check $name; done
