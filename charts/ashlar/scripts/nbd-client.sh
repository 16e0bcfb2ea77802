#!/bin/sh
# A node's nbd-client: `run` and `ready`.
#
# In an upgrade the new pod starts beside the old one: its process takes the devices over and the old process
# ends. Its pod is still there for a moment, and kubelet would start it again: then it would take the devices
# back. So this script keeps the old pod waiting, on the lock of the state directory, until it is deleted; or
# until the successor ends without one of its own: then it serves again.
#
# For the same moment the metrics have two addresses: both processes use the host's network, and one that cannot
# listen does not start.
#
# Environment: STATE_DIR, SOCKET, METRICS (addresses with ports, separated by spaces; may be empty).
set -u

: "${STATE_DIR:?}" "${SOCKET:?}" "${METRICS=}"

# The first of the addresses whose port nobody listens on.
free_address() {
    for address in $METRICS; do
        port=$(printf '%04X' "${address##*:}")
        if ! cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q "^ *[0-9]*: [0-9A-F]*:$port [0-9A-F]*:0000 0A "; then
            echo "$address"
            return
        fi
    done
    [ -z "$METRICS" ] || echo "no metrics: somebody listens on each of $METRICS" >&2
}

case ${1:?run or ready} in
run)
    shift
    ended=
    child=
    # shellcheck disable=SC2317,SC2329 # called by trap
    stop() {
        ended=yes
        [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
    }
    trap stop TERM INT
    # Waits for the child; a signal interrupts wait, so it is asked again.
    await() {
        while :; do
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || return "$code"
        done
    }
    while [ -z "$ended" ]; do
        address=$(free_address)
        if [ -n "$address" ]; then
            nbd-client node --state-dir="$STATE_DIR" --socket="$SOCKET" --metrics="$address" "$@" &
        else
            nbd-client node --state-dir="$STATE_DIR" --socket="$SOCKET" "$@" &
        fi
        child=$!
        await
        code=$?
        [ -z "$ended" ] || exit 0
        [ "$code" -eq 0 ] || exit "$code"
        echo "handed over; waiting in case the successor ends" >&2
        # The successor polls for the lock every few milliseconds: let it have it.
        sleep 3 &
        child=$!
        await
        [ -z "$ended" ] || exit 0
        flock --exclusive "$STATE_DIR/lock" true &
        child=$!
        await
    done
    ;;
ready)
    # A lock in sight belongs to a process of this pod: only those are in its process namespace. The socket
    # alone proves nothing, since both pods share it.
    grep -qs '^lock:.*FLOCK' /proc/[0-9]*/fdinfo/* || {
        echo "the devices are another pod's" >&2
        exit 1
    }
    exec nbd-client list --socket="$SOCKET" >/dev/null
    ;;
*)
    echo "unknown: $1" >&2
    exit 2
    ;;
esac
