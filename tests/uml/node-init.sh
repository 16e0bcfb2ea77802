#!/bin/sh
# PID 1 of a test node: a user-mode Linux kernel whose root is the host's, read-only, under a tmpfs overlay.
# From the kernel command line: SCRIPT (this file), NODE (host name), IP, MAC, SHARE (host directory shared
# with the test). Commands come as files $SHARE/N.cmd (a shell script); N.out and N.rc answer.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
if [ -z "$STAGE2" ]; then
  mount() { busybox mount "$@"; } # not setuid: works where the host's files show as owned by nobody
  mount -t proc proc /proc
  modules=/usr/lib/uml/modules/$(uname -r)
  insmod "$modules/kernel/fs/overlayfs/overlay.ko"
  mount -t tmpfs -o mode=755 over /mnt
  mkdir /mnt/upper /mnt/work /mnt/root
  mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
  busybox umount /proc
  cd /mnt/root && mkdir -p mnt/old && pivot_root . mnt/old
  STAGE2=1 exec chroot . /bin/sh "$SCRIPT" </dev/console >/dev/console 2>&1
fi
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /share
mount -t hostfs none -o "$SHARE" /share
mkdir -p /lib/modules
[ -e "/lib/modules/$(uname -r)" ] || ln -s "/usr/lib/uml/modules/$(uname -r)" /lib/modules/
hostname "$NODE"
ip link set lo up
ip link set vec0 address "$MAC"
ip addr add "$IP" dev vec0
ip link set vec0 up
touch /share/ready
n=1
while true; do
  if [ -e "/share/$n.cmd" ]; then
    bash "/share/$n.cmd" >"/share/$n.out" 2>&1 </dev/null
    echo $? >"/share/$n.rc.tmp"
    mv "/share/$n.rc.tmp" "/share/$n.rc"
    n=$((n + 1))
  else
    sleep 0.05
  fi
done
