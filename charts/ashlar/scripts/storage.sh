#!/bin/sh
# A node's storage daemon: `run` with the disks of $LIST, `ready`.
#
# Ready is a daemon whose replicas are in sync again, so that a rolling update goes on to the next node only
# then. It waits for that once, and RESYNC_WAIT_SECONDS at most: volumes that nobody uses catch up only when
# they are opened.
#
# Environment: LIST, ZONE, NODE_NAME, ASHLAR_METADATA, RESYNC_WAIT_SECONDS.
set -eu
set -f

: "${LIST:?}"
settled=$(dirname "$LIST")/settled
begun=$(dirname "$LIST")/begun

case ${1:?run or ready} in
run)
    shift
    rm -f "$settled"
    date +%s >"$begun"
    while IFS= read -r disk; do
        set -- "$@" --disk="$disk"
    done <"$LIST"
    if [ -n "${ZONE:-}" ]; then
        set -- "$@" --label=topology.kubernetes.io/zone="$ZONE"
    fi
    exec storage-daemon serve "$@"
    ;;
ready)
    [ ! -e "$settled" ] || exit 0
    disks=$(ashlar --timeout 4 --output json disk list --node "$NODE_NAME" | tr -d ' \n')
    # Registered and heard of, every one of them.
    case $disks in
    *'"alive":false'*) ready=no ;;
    *) ready=yes ;;
    esac
    served=$(printf '%s' "$disks" | grep -o '"data_address":"[^"]' | wc -l)
    [ "$served" -ge "$(wc -l <"$LIST")" ] || ready=no
    if [ "$ready" = yes ]; then
        for id in $(printf '%s' "$disks" | grep -o '"id":"[^"]*"' | cut -d '"' -f 4); do
            replicas=$(ashlar --timeout 4 --output json replica list --disk "$id" | tr -d ' \n')
            case $replicas in
            *'"state":"stale"'* | *'"state":"rebuilding"'*) ready=no ;;
            esac
        done
    fi
    if [ "$ready" = no ]; then
        waited=$(($(date +%s) - $(cat "$begun")))
        if [ "$waited" -lt "${RESYNC_WAIT_SECONDS:-600}" ]; then
            echo "replicas of this node are not in sync yet (for $waited s)"
            exit 1
        fi
    fi
    : >"$settled"
    ;;
*)
    echo "unknown: $1" >&2
    exit 2
    ;;
esac
