#!/bin/sh
# The suite that runs inside the node: every test program given to it, one test at a time, then the
# commands of a user with the image that came along. Each test answers with a line PASS or FAIL; the exit
# code says whether all passed.
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

for program in /lab/tests/*; do
    [ -x "$program" ] || continue
    name=${program##*/}
    only=$(cat "/lab/only/$name")
    # Shortly: the engine's contract, which goes through everything below it, and the devices.
    case "$length $name" in
    "short forkd-engine.lib") only=kvm::tests::linux ;;
    "short forkd-vmm.lab") only=devices ;;
    esac
    log=/out/$name.log
    echo "lab: $name after $(cut -d' ' -f1 /proc/uptime) s"
    { "$program" --test-threads=1 --nocapture ${filter:-$only} 2>&1; echo $? > /tmp/code; } | tee "$log"
    [ "$(cat /tmp/code)" = 0 ] || bad=1
    # What a test prints stands between its name and its result.
    awk -v program="$name" '
        /^test .+ \.\.\. / { test = $2 }
        /(^| )(ok|FAILED)$/ && test != "" {
            print ($NF == "ok" ? "PASS" : "FAIL"), program, test
            test = ""
        }' "$log"
done

if [ -d /lab/in/images ] && [ -x /lab/bin/forkd ] && [ -z "$filter" ]; then
    . /lab/user
fi
echo "lab: done after $(cut -d' ' -f1 /proc/uptime) s"
exit $bad
