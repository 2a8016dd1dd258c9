# What a user does, with the kvm engine: part of the suite, run in its shell.

# An image store is written to a little even when nothing is built.
data=/var/lib/forkd
mkdir -p $data/images /tmp/upper /tmp/work
busybox mount -t overlay -o lowerdir=/lab/in/images,upperdir=/tmp/upper,workdir=/tmp/work overlay $data/images
export FORKD_AGENT=/lab/in/forkd-agent FORKD_ENGINE=kvm
ulimit -n 4096

check() {
    name=$1
    shift
    echo "lab: $name after $(cut -d' ' -f1 /proc/uptime) s"
    if "$@"; then echo "PASS user $name"; else echo "FAIL user $name"; bad=1; fi
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
    FORKD_URL=none forkd quickstart --engine kvm -n $n && nothing_left
}

# auto takes the built-in monitor here.
chooses_kvm() { FORKD_URL=none forkd doctor --engine auto | grep -q '✓ vmm'; }

# A daemon, a branch that is forked at once and becomes ready, and a branch of its fork.
branches() {
    unset FORKD_URL
    forkd serve > /out/serve.log 2>&1 &
    daemon=$!
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        forkd ls > /dev/null 2>&1 && break
        sleep 1
    done
    first=$(forkd fork --tag quickstart -n 1) || return 1
    forkd exec "$first" -- sh -c 'echo one > /tmp/level' || return 1
    forkd branch "$first" --tag b1 --no-wait || return 1
    forkd images
    forkd exec "$first" -- sh -c 'echo changed > /tmp/level' || return 1
    second=$(forkd fork --tag b1 -n 1) || return 1
    [ "$(forkd exec "$second" -- cat /tmp/level)" = one ] || return 1
    forkd branch "$second" --tag b2 || return 1
    third=$(forkd fork --tag b2 -n 1) || return 1
    [ "$(forkd exec "$third" -- cat /tmp/level)" = one ] || return 1
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        forkd images | grep -q writing || break
        sleep 1
    done
    forkd images
    [ "$(forkd images | grep -c ready)" = 3 ]
}

# kill -9: the next daemon finds what survived, and sweeps what did not.
recovers() {
    kill -9 "$daemon"
    wait "$daemon" 2>/dev/null
    forkd serve > /out/serve2.log 2>&1 &
    daemon=$!
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        forkd ls > /dev/null 2>&1 && break
        sleep 1
    done
    forkd ls
    [ "$(forkd exec "$third" -- cat /tmp/level)" = one ] || return 1
    again=$(forkd fork --tag b2 -n 1) || return 1
    [ "$(forkd exec "$again" -- cat /tmp/level)" = one ] || return 1
    forkd kill --all && forkd images
    kill "$daemon" && wait "$daemon"
    nothing_left
}

check quickstart quickstart
check chooses_kvm chooses_kvm
check branches branches
check recovers recovers
