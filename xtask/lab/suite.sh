#!/bin/sh
# The suite that runs inside the node: every test program given to it, one test at a time, then the
# commands of a user with the image that came along. Each test answers with a line PASS or FAIL; the exit
# code says whether all passed. A test that an earlier node of the same run has answered for is left out.
set -u
filter=$(cat /lab/filter)
length=$(cat /lab/length)
echo "lab: $(uname -r), $(nproc) cpus, kvm $(test -c /dev/kvm && echo present || echo MISSING)"
bad=0

# The image as tests of single crates want it: a directory of plain files.
if [ -d /lab/in/images ]; then
    mkdir -p /run/guest
    # A store that was built more than once has blobs of earlier images, too.
    part() { sed -n "s/^ *\"$1\": \"\([0-9a-f]*\)\",*$/\1/p" /lab/in/images/images/python3-numpy/image.json; }
    ln -s "/lab/in/images/blobs/kernel-$(part kernel)/vmlinuz" /run/guest/kernel
    ln -s "/lab/in/images/blobs/initramfs-$(part initramfs)/initramfs.cpio" /run/guest/initramfs
    ln -s "/lab/in/images/blobs/rootfs-$(part rootfs)/rootfs.erofs" /run/guest/rootfs
    export FORKD_TEST_IMAGE_DIR=/run/guest
fi

uptime() { cut -d' ' -f1 /proc/uptime; }

# Whether an earlier node of this run has got as far as a result for this.
known() { grep -qxF "$1" /run/known; }

# result PASS|FAIL NAME SINCE
result() { echo "$1 $2 ($(echo "$(uptime) $3" | awk '{ printf "%.0f", $1 - $2 }') s)"; }

for program in /lab/tests/*; do
    [ -x "$program" ] || continue
    name=${program##*/}
    only=$(cat "/lab/only/$name")
    # Shortly: the engine's contract, which goes through everything below it, and the devices.
    case "$length $name" in
    "short forkd-engine.lib") only="kvm::tests::linux firecracker::tests::linux" ;;
    "short forkd-vmm.lab") only=devices ;;
    esac
    if ! "$program" --list --format terse ${filter:-$only} > /tmp/tests; then
        echo "FAIL $name"
        bad=1
    fi
    # What is only run when asked for by name would pass without being run.
    "$program" --list --format terse --ignored > /tmp/ignored
    for test in $(grep -vxFf /tmp/ignored /tmp/tests | sed -n 's/: test$//p'); do
        known "$name $test" && continue
        since=$(uptime)
        { "$program" --exact "$test" --nocapture 2>&1; echo $? > /tmp/code; } | tee -a "/out/$name.log"
        if [ "$(cat /tmp/code)" = 0 ]; then
            result PASS "$name $test" "$since"
        else
            result FAIL "$name $test" "$since"
            bad=1
        fi
    done
done

if [ -d /lab/in/images ] && [ -x /lab/bin/forkd ] && [ -z "$filter" ]; then
    . /lab/user
fi
echo "lab: done after $(uptime) s"
exit $bad
