#!/bin/busybox sh
# First program of the guests that the tests boot. What to do is on the kernel's command line:
# lab.do=WORD[,WORD...]. Answers go to the console as lines that begin with `lab:`.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
echo "lab: userspace $(uname -r) cpus $(grep -c ^processor /proc/cpuinfo)"
while read -r module; do insmod "/modules/$module" || echo "lab: insmod $module failed"; done \
    < /modules/load.list
words=$(sed -n 's/.*lab\.do=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ')

# Mounts the first disk with a writable overlay on /root.
root() {
    mkdir -p /lower /rw /root
    mount -t erofs -o ro /dev/vda /lower || { echo "lab: root failed"; return 1; }
    mount -t tmpfs tmpfs /rw
    mkdir -p /rw/upper /rw/work
    mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /root
    for fs in proc sys dev; do mount -o bind /$fs /root/$fs; done
    echo "lab: root $(sed -n 's/^PRETTY_NAME=//p' /root/etc/os-release)"
}

for word in $words; do
    case $word in
    root) root ;;
    sum) echo "lab: sum $(md5sum < /dev/vda | cut -c1-32)" ;;
    write)
        dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
        dd if=/tmp/data of=/dev/vdb bs=1M oflag=direct conv=fsync 2>/dev/null && sync
        echo "lab: write $(md5sum < /tmp/data | cut -c1-32)" ;;
    readonly)
        dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null && echo "lab: readonly no" \
            || echo "lab: readonly yes" ;;
    rng) echo "lab: rng $(cat /sys/class/misc/hw_random/rng_current)" \
            "$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)" ;;
    net)
        ip link set eth0 up && ip addr add 10.42.0.2/30 dev eth0
        echo "lab: mac $(cat /sys/class/net/eth0/address)"
        for try in 1 2 3 4 5; do
            ping -c 1 -W 1 10.42.0.1 >/dev/null 2>&1 && { echo "lab: net up"; break; }
        done ;;
    vsock) chroot /root /usr/bin/python3 -c '
import socket, threading
def serve(conn):
    while True:
        data = conn.recv(65536)
        if not data: break
        conn.sendall(data)
    conn.close()
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.bind((socket.VMADDR_CID_ANY, 49983)); s.listen(16)
print("lab: vsock listening", flush=True)
while True:
    c, a = s.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()
' & ;;
    dial) chroot /root /usr/bin/python3 -c '
import socket
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.settimeout(5)
try:
    s.connect((2, 1234)); s.sendall(b"hello from the guest\n")
    print("lab: dial", s.recv(100).decode().strip(), flush=True)
except Exception as e: print("lab: dial failed", e.__class__.__name__, flush=True)
' ;;
    count)
        n=0
        while true; do n=$((n + 1)); echo "lab: count $n"; sleep 0.2; done & ;;
    disk)
        # Reads the disk without pause, past the cache, and compares.
        first() { dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | md5sum | cut -c1-32; }
        want=$(first)
        n=0
        while true; do
            n=$((n + 1))
            [ "$(first)" = "$want" ] && echo "lab: disk $n" || echo "lab: disk WRONG $n"
        done & ;;
    ticks) chroot /root /usr/bin/python3 -c '
import time
last, said, n = 0.0, 0.0, 0
while True:
    now = time.monotonic()
    if now < last: print("lab: ticks BACK", last, now, flush=True)
    if now > said + 0.2:
        n += 1; said = now
        print("lab: ticks", n, flush=True)
    last = now
    time.sleep(0.001)
' & ;;
    high) chroot /root /usr/bin/python3 -c '
import ctypes, mmap, time
PAGE, PAGES = 4096, 256
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def get(page): return int.from_bytes(memory[page * PAGE:page * PAGE + 8], "little")
def put(page, value): memory[page * PAGE:page * PAGE + 8] = value.to_bytes(8, "little")
for page in range(PAGES): put(page, page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
    pagemap.seek(address // PAGE * 8)
    entries = memoryview(pagemap.read(PAGES * 8)).cast("Q")
print("lab: above", sum(entry & ((1 << 55) - 1) >= 1 << 20 for entry in entries), flush=True)
n = 0
while True:
    n += 1
    for page in range(PAGES):
        if get(page) != page + n - 1: print("lab: high WRONG", page, n, flush=True)
        put(page, page + n)
    print("lab: high", n, flush=True)
    time.sleep(0.2)
' & ;;
    devices) for d in /sys/bus/virtio/devices/*; do echo "lab: device $(cat $d/device)"; done ;;
    interrupts) sed 's/^/lab: irq /' /proc/interrupts ;;
    memory) echo "lab: memory $(sed -n "s/MemTotal: *\([0-9]*\).*/\1/p" /proc/meminfo)" ;;
    clock) echo "lab: clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" ;;
    acpi) for d in /sys/bus/acpi/devices/*; do echo "lab: acpi ${d##*/}"; done ;;
    poweroff) echo "lab: bye"; poweroff -f ;;
    reboot) echo "lab: bye"; reboot -f ;;
    crash) echo "lab: bye"; echo c > /proc/sysrq-trigger ;;
    esac
done
echo "lab: done"
wait
while true; do sleep 1000; done
