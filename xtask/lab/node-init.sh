#!/bin/busybox sh
# First program of the node: modules, root, inputs, then the suite.
# ttyS0 carries the output of the suite, ttyS1 the kernel's log, ttyS2 the result.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod "/modules/$module" || echo "lab: insmod $module failed"; done \
    < /modules/load.list > /dev/ttyS1 2>&1
mkdir -p /lower /rw /new
mount -t erofs -o ro /dev/vda /lower || echo "lab: no root" > /dev/ttyS0
mount -t tmpfs -o size=80% tmpfs /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new
mkdir -p /new/lab /new/out
mount -t erofs -o ro /dev/vdb /new/lab || echo "lab: no inputs" > /dev/ttyS0
for fs in proc sys dev; do mount --move /$fs /new/$fs; done
mkdir -p /new/dev/shm /new/dev/pts
mount -t tmpfs tmpfs /new/tmp
mount -t tmpfs tmpfs /new/run
mount -t devpts devpts /new/dev/pts
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
# Which tests earlier nodes of this run have answered for.
tr -d '\0' < /new/dev/vdd > /new/run/known
ip link set lo up
hostname lab
export PATH=/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export FORKD_LAB=/lab RUST_BACKTRACE=1 TERM=dumb
# No escape sequences, no carriage returns: what the suite writes arrives as it is.
stty -F /new/dev/ttyS0 raw -echo
stty -F /new/dev/ttyS2 raw -echo
cat > /new/run/init <<'END'
/bin/sh /lab/run > /dev/ttyS0 2>&1 < /dev/null
result=$?
tar -C /out -cf /dev/vdc . 2>/dev/null
sync
echo "$result" > /dev/ttyS2
busybox poweroff -f
END
# As a node of its own has it: a namespace of mounts begins at this root, not at the first one.
exec switch_root /new /bin/sh /run/init
