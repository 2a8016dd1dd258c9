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
    forkd serve --require-isolation > "/out/$1.log" 2>&1 &
    daemon=$!
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        timeout 5 forkd ls > /dev/null 2>&1 && return 0
        sleep 1
    done
    echo "the daemon does not answer"
    return 1
}

monitors() { ps ax -o comm=,args= | grep -c '[f]orkd-vmm\|[f]irecracker --id'; }

nothing_left() {
    for try in 1 2 3 4 5 6 7 8 9 10; do
        left=$(monitors)
        [ "$left" = 0 ] && [ -z "$(ls /run/forkd 2>/dev/null)" ] && return 0
        sleep 1
    done
    echo "left: $left processes, $(ls /run/forkd)"
    ps ax | grep '[f]orkd-vmm\|[f]irecracker --id'
    return 1
}

quickstart() {
    [ "$length" = short ] && n=3 || n=10
    FORKD_URL=none timeout 240 forkd quickstart --engine kvm -n $n && nothing_left
}

# auto takes the built-in monitor here, and nothing is missing that keeps sandboxes apart.
doctor() {
    FORKD_URL=none forkd doctor --engine auto > /out/doctor.log
    code=$?
    for part in vmm kvm "cgroup v2" tun nft; do
        grep -q "✓ $part" /out/doctor.log || { echo "doctor is not content with $part"; code=1; }
    done
    [ "$code" = 0 ] || cat /out/doctor.log
    return "$code"
}

# Machines of QEMU with hardware virtualisation, and what they see from inside their jail.
confined_qemu() {
    {
        FORKD_URL=none FORKD_DATA_DIR=/var/lib/forkd-qemu FORKD_IMAGE_ROOT=$data/images \
            timeout 300 forkd quickstart --engine qemu -n 2
        echo $? > /tmp/code
    } &
    job=$!
    : > /tmp/seen
    while kill -0 $job 2> /dev/null; do
        for pid in $(pidof qemu-system-x86_64); do look_into_jail "$pid" >> /tmp/seen; done
        sleep 1
    done
    wait $job
    [ "$(cat /tmp/code)" = 0 ] || return 1
    sort /tmp/seen | uniq -c
    # Of some process all was seen, and of none anything bad.
    grep -q '^confined: with /dev/kvm' /tmp/seen && ! grep -q '^open' /tmp/seen && nothing_left
}

# Says what holds one machine's process; nothing when it is not yet, or no longer, what it will be.
look_into_jail() {
    tr '\0' ' ' < "/proc/$1/cmdline" 2> /dev/null | grep -q -- '-accel kvm' || return
    user=$(stat -c %u "/proc/$1") && root=$(ls "/proc/$1/root/") || return
    caps=$(sed -n 's/^CapEff:\t//p' "/proc/$1/status")
    filter=$(sed -n 's/^Seccomp:\t//p' "/proc/$1/status")
    [ -n "$root" ] && [ -n "$filter" ] || return
    if [ "$user" -lt 1879048192 ] || [ "$caps" != 0000000000000000 ] || [ "$filter" != 2 ] \
        || [ -e "/proc/$1/root/var/lib/forkd-qemu" ] || [ -e "/proc/$1/root/bin/sh" ]; then
        echo "open: user $user, capabilities $caps, filter $filter, root" $root
    elif [ -c "/proc/$1/root/dev/kvm" ]; then
        echo "confined: with /dev/kvm"
    fi
}

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

# A user's day with Firecracker, where the machine that made this node has it: forks, a branch of one and a fork of
# that, a pause, the network, and a daemon that is killed and finds them again.
with_firecracker() {
    if [ ! -x /lab/bin/firecracker ]; then
        echo "skipped: no firecracker on PATH"
        return 0
    fi
    export FORKD_ENGINE=firecracker FORKD_DATA_DIR=/var/lib/forkd-firecracker FORKD_IMAGE_ROOT=$data/images
    firecracker_day
    day=$?
    export FORKD_ENGINE=kvm
    unset FORKD_DATA_DIR FORKD_IMAGE_ROOT
    return $day
}

firecracker_day() {
    FORKD_URL=none forkd doctor > /out/doctor-firecracker.log
    grep '✓ firecracker' /out/doctor-firecracker.log || { cat /out/doctor-firecracker.log; return 1; }
    [ "$length" = short ] && n=2 || n=5
    FORKD_URL=none timeout 300 forkd quickstart -n $n && nothing_left || return 1
    unset FORKD_URL
    world
    serve serve-firecracker || return 1
    first=$(run fork --tag quickstart -n 1) || return 1
    reaches "$first" 93.184.215.14 || { echo "the public internet is not reached"; return 1; }
    reaches_none "$first" || return 1
    held_by_firecracker "$first" || return 1
    run exec "$first" -- sh -c 'echo one > /tmp/level' || return 1
    # A branch ends what is under way, which is told at once.
    timeout 300 forkd exec "$first" --no-stdin -- sleep 300 2> /tmp/cut &
    cut=$!
    sleep 3
    run branch "$first" --tag f1 || return 1
    wait $cut && { echo "a call lived on"; return 1; }
    cat /tmp/cut
    grep -q '^error: ' /tmp/cut || { echo "a call that a branch ended hung"; return 1; }
    run exec "$first" -- sh -c 'echo changed > /tmp/level' || return 1
    second=$(run fork --tag f1 -n 1) || return 1
    [ "$(run exec "$second" -- cat /tmp/level)" = one ] || return 1
    run pause "$second" && run resume "$second" || return 1
    [ "$(run exec "$second" -- cat /tmp/level)" = one ] || return 1
    third=$(run fork --tag quickstart -n 1 --memory-limit-mib 64) || return 1
    run exec "$third" -- python3 -c 'x = bytearray(200 << 20); print(len(x))' && { echo "no limit"; return 1; }
    run exec "$third" -- true 2> /tmp/why
    grep -q oom /tmp/why || { echo "it says $(cat /tmp/why)"; return 1; }
    kill -9 "$daemon"
    wait "$daemon" 2> /dev/null
    serve serve-firecracker2 || return 1
    run ls
    [ "$(run exec "$first" -- cat /tmp/level)" = changed ] || return 1
    run branch "$second" --tag f2 || return 1
    third=$(run fork --tag f2 -n 1) || return 1
    [ "$(run exec "$third" -- cat /tmp/level)" = one ] || return 1
    run kill --all && run images || return 1
    kill "$daemon" && wait "$daemon"
    kill $web
    nothing_left
}

# What holds a sandbox's process: its user, no capabilities, filters, its own files, its slot's network, its group.
held_by_firecracker() {
    pid=$(pidof firecracker)
    user=$(stat -c %u "/proc/$pid")
    caps=$(sed -n 's/^CapEff:\t//p' "/proc/$pid/status")
    filters=$(sed -n 's/^Seccomp_filters:\t//p' "/proc/$pid/status")
    group=$(cut -d: -f3 "/proc/$pid/cgroup")
    echo "user $user, capabilities $caps, filters $filters, group $group, root" $(ls "/proc/$pid/root/")
    [ "$user" -ge 1879048192 ] && [ "$caps" = 0000000000000000 ] && [ "$filters" = 3 ] \
        && [ ! -e "/proc/$pid/root/bin" ] && case $group in *"$1"*) true ;; *) false ;; esac
}

public=93.184.215.14 public6=2606:2800:220:1::14

# A world beyond an uplink: a public machine, somebody's private one, the clouds' metadata service; of both versions.
world() {
    ip link del up0 2> /dev/null
    ip netns del world 2> /dev/null
    ip netns add world
    ip link add up0 type veth peer name eth0 netns world
    ip addr add 192.88.99.1/24 dev up0
    ip addr add 2a00:5::1/64 dev up0 nodad
    ip link set up0 up
    ip -n world link set eth0 up
    for address in 192.88.99.2/24 93.184.215.14/32 10.7.0.1/32 169.254.169.254/32; do
        ip -n world addr add $address dev eth0
    done
    for address in 2a00:5::2/64 "$public6/128" fd12:3456::1/128 fd00:ec2::254/128; do
        ip -n world addr add $address dev eth0 nodad
    done
    ip route add default via 192.88.99.2
    ip -6 route add default via 2a00:5::2
    # It takes connections of version 4, too.
    ip netns exec world python3 -m http.server --bind :: --directory /tmp 80 > /dev/null 2>&1 &
    web=$!
    # They answer this node: what a guest does not reach is refused, not absent.
    for address in $public "[$public6]" 10.7.0.1 '[fd12:3456::1]' '[fd00:ec2::254]'; do
        answers $address || { echo "$address does not answer this node"; return 1; }
    done
}

answers() {
    for try in 1 2 3 4 5 6 7 8 9 10; do
        python3 -c "import urllib.request; urllib.request.urlopen('http://$1/', timeout=15)" 2> /dev/null && return 0
        sleep 1
    done
    return 1
}

# Whether a sandbox gets an answer from there.
reaches() {
    run exec "$1" -- python3 -c "import urllib.request; urllib.request.urlopen('http://$2/', timeout=15)" 2> /dev/null
}

# What no guest reaches: all at once, because each is only given up when its time is over.
reaches_none() {
    found=$(run exec "$1" -- python3 -c "import socket, sys, threading
def attempt(to):
    host, port = to.rsplit(',', 1)
    try:
        socket.create_connection((host, int(port)), 15).close()
        print(to)
    except OSError: pass
threads = [threading.Thread(target=attempt, args=(to,)) for to in sys.argv[1:]]
for t in threads: t.start()
for t in threads: t.join()" 10.7.0.1,80 169.254.169.254,80 192.88.99.1,8889 10.43.0.1,8889 \
        fd12:3456::1,80 fd00:ec2::254,80 2a00:5::1,8889) || return 1
    [ -z "$found" ] || { echo "$1 reaches $found"; return 1; }
}

reaches_both() {
    for address in $public "[$public6]"; do
        reaches "$1" $address || { echo "$1 does not reach $address $2"; return 1; }
    done
}

reaches_neither() {
    for address in $public "[$public6]"; do
        if reaches "$1" $address; then echo "$1 reaches $address $2"; return 1; fi
    done
}

# Default, rules that change, the jail's user: for a fork and for a branch of it, by both versions of IP.
networks() {
    world || return 1
    FORKD_URL=none forkd doctor --engine auto | grep '✓ guest IPv6' || { echo "doctor sees no IPv6"; return 1; }
    serve serve3 || return 1
    first=$(run fork --tag quickstart -n 1) || return 1
    reaches_both "$first" "by default" || return 1
    reaches_none "$first" || return 1
    run branch "$first" --tag b3 || return 1
    reaches_both "$first" "after its branch" || return 1
    second=$(run fork --tag b3 -n 1 --deny all) || return 1
    reaches_neither "$second" "though all is denied" || return 1
    run network "$second" --deny all --allow "$public:80" --allow "[$public6]:80" || return 1
    reaches_both "$second" "though it is allowed" || return 1
    reaches_none "$second" || return 1
    run network "$second" --deny "$public6" || return 1
    if reaches "$second" "[$public6]"; then echo "a denied address of version 6 is reached"; return 1; fi
    reaches "$second" $public || { echo "version 4 went with what was denied of version 6"; return 1; }
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

ms() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

# The longest of three answers of a sandbox, in milliseconds.
slowest() {
    worst=0
    for try in 1 2 3; do
        from=$(ms)
        timeout 60 forkd exec "$1" -- true || return 1
        took=$(($(ms) - from))
        [ $took -gt $worst ] && worst=$took
    done
    echo $worst
}

# What the guest does.
attack() {
    case $1 in
    hog) echo 'python3 -c "x = bytearray(400 << 20); import time; time.sleep(30)"' ;;
    bomb) echo 'b() { b | b & b; }; b' ;;
    burn) echo 'while :; do :; done' ;;
    fill) echo 'while :; do dd if=/dev/zero of=/tmp/fill bs=1M count=2000; done' ;;
    esac
}

used_us() { sed -n 's/^usage_usec //p' "$1/cpu.stat"; }
number_of() { sed -n "s/^$2 //p" "$1"; }
# As long as files are, not as full: on the node's tmpfs, reading a hole of a snapshot fills it.
disk_kib() { du -sk --apparent-size --exclude=images $data | cut -f1; }

# held KIND GROUP SANDBOX: whether the host has contained it.
held() {
    case $1 in
    hog)
        for try in 1 2 3 4 5 6 7 8 9 10; do
            timeout 60 forkd exec "$3" -- true 2>&1 | grep -q oom && return 0
            sleep 2
        done
        return 1 ;;
    bomb) [ "$(cat "$2/pids.current")" -le 64 ] ;;
    burn)
        used=$(used_us "$2")
        from=$(ms)
        sleep 4
        share=$(($(used_us "$2") - used))
        share=$((share / ($(ms) - from)))
        echo "burn uses $share thousandths of a processor, limited to 300"
        [ "$share" -le 400 ] && [ "$(number_of "$2/cpu.stat" nr_throttled)" -gt 0 ] ;;
    fill)
        # Its disk is the guest's memory: the host's grows by nothing but records.
        grown=$(($(disk_kib) - kib))
        echo "fill added $grown KiB to the disk; $(cat "$2/memory.current" 2> /dev/null || echo ended) bytes of memory"
        [ "$grown" -le 16384 ] && { [ ! -d "$2" ] || [ "$(cat "$2/memory.current")" -le $((400 << 20)) ]; } ;;
    esac
}

# Sandboxes that take memory, processes, processor time or room without end: each is held to its own share,
# and a neighbour answers all the while.
contained() {
    serve serve4 || return 1
    first=$(run fork --tag quickstart -n 1) || return 1
    calm=$(slowest "$first") || return 1
    kib=$(disk_kib)
    for kind in hog bomb burn fill; do
        case $kind in
        hog) limit='--memory-limit-mib 64' ;;
        fill) limit='--memory-limit-mib 400' ;;
        *) limit='--cpu-limit-milli 300' ;;
        esac
        second=$(run fork --tag quickstart -n 1 $limit) || return 1
        group=$(find /sys/fs/cgroup/forkd -type d -name "*$second*")
        timeout 60 forkd exec "$second" --no-stdin -- sh -c "$(attack $kind)" > /dev/null 2>&1 &
        attacker=$!
        sleep 3
        worst=$(slowest "$first") || { echo "no answer beside $kind"; return 1; }
        echo "figure exec_beside_${kind}_ms $worst alone $calm"
        [ "$worst" -le $((calm * 10 + 2000)) ] || { echo "an answer took $worst ms beside $kind"; return 1; }
        held $kind "$group" "$second" || { echo "$kind is not held"; return 1; }
        run kill "$second" 2> /dev/null
        wait $attacker
    done
    run kill --all || return 1
    kill "$daemon" && wait "$daemon"
    nothing_left
}

checks="quickstart doctor branches recovers networks limits with_firecracker"
[ "$length" = short ] || checks="$checks contained confined_qemu"
for name in $checks; do check $name; done
