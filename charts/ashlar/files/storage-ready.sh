#!/bin/sh
# Is an update allowed to go on to the next node? Once yes, always yes, until the container starts again.
#   ASHLAR_READY_DIR        as storage.sh
#   ASHLAR_UPDATE_WAIT      seconds after which the answer is yes in any case
# Yes if no volume lacks a replica. Volumes that nobody uses are repaired when they are used, hence the limit.
set -u

[ -e "$ASHLAR_READY_DIR/ready" ] && exit 0
[ -e "$ASHLAR_READY_DIR/started" ] || exit 1
if status=$(ashlar --timeout 3 -o json cluster status 2>&1); then
    case $(echo "$status" | tr -d ' \n') in
    *'"volumes_degraded":0,'*) touch "$ASHLAR_READY_DIR/ready"; exit 0 ;;
    esac
fi
read -r started <"$ASHLAR_READY_DIR/started"
if [ $(($(date +%s) - started)) -ge "$ASHLAR_UPDATE_WAIT" ]; then
    touch "$ASHLAR_READY_DIR/ready"
    exit 0
fi
echo "$status" | tail -n 20
exit 1
