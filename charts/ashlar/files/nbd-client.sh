#!/bin/sh
# Runs `nbd-client node` so that a DaemonSet can update it by hand-over.
#   ASHLAR_STATE_DIR    the state directory of the node, the same for the old pod and the new one
#   ASHLAR_IDLE_POLL    seconds between two looks (5)
# The arguments are those of `nbd-client node`.
#
# During an update two pods run on the node (maxSurge 1). The new process takes the devices over from the old one,
# which then ends by itself with code 0. If the old container ended, too, kubelet would start it again, and it
# would take the devices back. So it stays, idle, until it is told to stop; and if the state directory has no
# process for a while (the new pod was deleted, as in a roll-back), it ends, to be started again and take over.
set -u

poll=${ASHLAR_IDLE_POLL:-5}
# Looks in a row that must find nobody.
patience=6

stopping=
nbd-client node "$@" &
child=$!
trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM INT
code=0
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
[ -z "$stopping" ] && [ "$code" -eq 0 ] || exit "$code"

echo "nbd-client.sh: everything is handed over; idle until this pod is stopped" >&2
trap 'kill "$sleeper" 2>/dev/null; exit 0' TERM INT
free=0
sleeper=
while [ "$free" -lt "$patience" ]; do
    sleep "$poll" &
    sleeper=$!
    wait "$sleeper"
    if flock --nonblock "$ASHLAR_STATE_DIR/lock" true; then
        free=$((free + 1))
    else
        free=0
    fi
done
echo "nbd-client.sh: nobody has the devices; ending to take them again" >&2
