#!/bin/sh
# Checks around helm's operations: `pre-upgrade`, `pre-delete`, and `post-install`, which makes the first pool.
# Each may be repeated. What it prints is in the log of its Job.
#
# Environment: ASHLAR_METADATA, FORCE; for post-install POOL, REPLICAS, FAILURE_DOMAIN, WAIT_SECONDS.
set -eu

refuse() {
    echo "REFUSED: $1" | tee /dev/termination-log >&2
    exit 1
}

status() {
    ashlar --timeout 20 --output json cluster status | tr -d ' \n'
}

# A number of the JSON text in $1.
number() {
    printf '%s' "$1" | grep -o "\"$2\":[0-9]*" | head -n 1 | cut -d : -f 2
}

case ${1:?pre-upgrade, pre-delete or post-install} in
pre-upgrade)
    if [ "${FORCE:-false}" = true ]; then
        echo "not checked: upgrade.force is set"
        exit 0
    fi
    now=$(status) || refuse "the metadata cluster does not answer. Repair it first, or set upgrade.force=true."
    degraded=$(number "$now" volumes_degraded)
    waiting=$(number "$now" volumes_waiting)
    if [ "${degraded:-1}" -ne 0 ] || [ "${waiting:-1}" -ne 0 ]; then
        ashlar --timeout 20 cluster status || true
        refuse "$degraded volumes are degraded, $waiting wait for replicas: an upgrade restarts daemons one by one \
and could stop them. See 'ashlar replica list'; wait for the rebuild, or set upgrade.force=true."
    fi
    echo "every replica is in sync"
    ;;
pre-delete)
    if [ "${FORCE:-false}" = true ]; then
        echo "not checked: uninstall.force is set"
        exit 0
    fi
    now=$(status) || refuse "the metadata cluster does not answer, so nobody knows whether volumes exist. Repair it, or \
set uninstall.force=true by 'helm upgrade' first (or uninstall with --no-hooks)."
    volumes=$(number "$now" volumes)
    if [ "${volumes:-1}" -ne 0 ]; then
        ashlar --timeout 20 volume list || true
        refuse "$volumes volumes exist. Delete their claims first, or set uninstall.force=true by 'helm upgrade' first \
(or uninstall with --no-hooks): the data stay on the disks."
    fi
    echo "no volume exists"
    ;;
post-install)
    until_time=$(($(date +%s) + ${WAIT_SECONDS:-600}))
    # Every member must have answered before there is a pool: the members' guard relies on it.
    for member in $(printf '%s' "$ASHLAR_METADATA" | tr ',' ' '); do
        until ashlar --metadata "$member" --timeout 5 cluster status >/dev/null; do
            [ "$(date +%s)" -lt "$until_time" ] || refuse "the member $member does not answer: 'kubectl get pods' says why."
            sleep 2
        done
        echo "$member answers"
    done
    if ashlar pool show "$POOL" >/dev/null 2>&1; then
        echo "the pool $POOL is there"
        exit 0
    fi
    ashlar pool create "$POOL" --replicas "$REPLICAS" --failure-domain "$FAILURE_DOMAIN"
    ;;
*)
    echo "unknown: $1" >&2
    exit 2
    ;;
esac
