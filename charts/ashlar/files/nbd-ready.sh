#!/bin/sh
# Is this pod's nbd-client the one that has the devices, and does it answer?
#   ASHLAR_STATE_DIR, ASHLAR_NBD_SOCKET   as nbd-client
# During an update the old pod's process answers on the same socket, so the lock is looked at: the kernel shows
# in /proc/locks only locks of processes in the reader's own PID namespace, that is, of this pod.
set -u

inode=$(stat -c %i "$ASHLAR_STATE_DIR/lock") || exit 1
if ! grep -q "FLOCK .*:$inode 0 EOF" /proc/locks; then
    echo "another pod's process has $ASHLAR_STATE_DIR"
    exit 1
fi
exec nbd-client list --timeout 5
