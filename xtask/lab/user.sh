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
    since=$(uptime)
    if "$name"; then
        result PASS "user $name" "$since"
    else
        result FAIL "user $name" "$since"
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

# A world beyond an uplink: a public machine, somebody's private one, the clouds' metadata service.
world() {
    ip netns add world
    ip link add up0 type veth peer name eth0 netns world
    ip addr add 192.88.99.1/24 dev up0
    ip link set up0 up
    ip -n world link set eth0 up
    for address in 192.88.99.2/24 93.184.215.14/32 10.7.0.1/32 169.254.169.254/32; do
        ip -n world addr add $address dev eth0
    done
    ip route add default via 192.88.99.2
    ip netns exec world python3 -m http.server --bind 0.0.0.0 --directory /tmp 80 > /dev/null 2>&1 &
    web=$!
}

# Whether a sandbox gets an answer from there.
reaches() {
    run exec "$1" -- python3 -c "import urllib.request; urllib.request.urlopen('http://$2/', timeout=15)" 2> /dev/null
}

reaches_none() {
    for address in 10.7.0.1 169.254.169.254 192.88.99.1:8889 10.43.0.1:8889; do
        if reaches "$1" $address; then
            echo "$1 reaches $address"
            return 1
        fi
    done
}

# Default, rules that change, the jail's user: for a fork and for a branch of it.
networks() {
    world
    serve serve3 || return 1
    first=$(run fork --tag quickstart -n 1) || return 1
    reaches "$first" 93.184.215.14 || { echo "the public internet is not reached"; return 1; }
    reaches_none "$first" || return 1
    run branch "$first" --tag b3 || return 1
    second=$(run fork --tag b3 -n 1 --deny all) || return 1
    if reaches "$second" 93.184.215.14; then echo "what is denied is reached"; return 1; fi
    run network "$second" --deny all --allow 93.184.215.14:80 || return 1
    reaches "$second" 93.184.215.14 || { echo "what is allowed is not reached"; return 1; }
    pid=$(run ls --json | grep -o '"pid": [0-9]*' | head -1 | grep -o '[0-9]*')
    [ "$(stat -c %u /proc/$pid)" -ge 1879048192 ] || { echo "the monitor runs as user $(stat -c %u /proc/$pid)"; return 1; }
}

# One sandbox takes more memory than it may, and ends alone.
limits() {
    third=$(run fork --tag quickstart -n 1 --memory-limit-mib 64) || return 1
    run exec "$third" -- python3 -c 'x = bytearray(200 << 20); print(len(x))' && { echo "no limit"; return 1; }
    run exec "$third" -- true 2> /tmp/why
    grep -q oom /tmp/why || { echo "it says $(cat /tmp/why)"; return 1; }
    run exec "$first" -- true || return 1
    run kill --all || return 1
    kill "$daemon" && wait "$daemon"
    kill $web
    nothing_left || return 1
    left=$(ls /run/netns | grep -c forkd-child; find /sys/fs/cgroup/forkd -mindepth 1 -name 'node-*' | wc -l)
    [ "$(echo $left)" = "0 0" ] || { echo "left: $left"; ls /run/netns; find /sys/fs/cgroup/forkd -type d; return 1; }
}

for name in quickstart chooses_kvm branches recovers networks limits; do check $name; done
