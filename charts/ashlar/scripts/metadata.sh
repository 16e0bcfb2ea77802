#!/bin/sh
# A metadata member: `guard` before it starts, `run`, `ready`.
#
# Invariant: a member that was of the first ones and lost its directory never starts under its old id again. It
# has forgotten its votes; with it the cluster could choose two leaders and lose what it decided.
#
# Environment: MEMBER_ID, INITIAL_MEMBERS, BOOTSTRAP, DATA, ASHLAR_METADATA.
set -eu

empty() {
    [ ! -d "$DATA" ] || [ -z "$(ls -A "$DATA")" ]
}

initial() {
    [ "$MEMBER_ID" -le "$INITIAL_MEMBERS" ]
}

case ${1:?guard, run or ready} in
guard)
    if ! empty || ! initial; then
        exit 0
    fi
    # The first pool is made only when every member has answered: if there is one, this member was there, too.
    pools=$(ashlar --timeout 5 --output json pool list 2>/dev/null | tr -d ' \n' || true)
    case $pools in
    *'"id":'*)
        {
            echo "Member $MEMBER_ID has an empty directory, but the cluster exists: its data were lost."
            echo "It must not start again under this id. The other members go on without it. Raise"
            echo "metadata.members, so that new members join, or give it its old data back."
        } | tee /dev/termination-log >&2
        exit 1
        ;;
    esac
    ;;
run)
    shift
    if initial; then
        set -- --bootstrap="$BOOTSTRAP" "$@"
    else
        set -- --join="$ASHLAR_METADATA" "$@"
    fi
    exec metadata-raft --id="$MEMBER_ID" --data="$DATA" "$@"
    ;;
ready)
    exec ashlar --metadata="127.0.0.1:${PORT:-7101}" --timeout=4 cluster status >/dev/null
    ;;
*)
    echo "unknown: $1" >&2
    exit 2
    ;;
esac
