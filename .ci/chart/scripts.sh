#!/bin/sh
# Runs the chart's shell scripts as its containers do, against a real cluster of real processes.
# Usage: scripts.sh BINARIES
set -eu
cd "$(dirname "$0")/../.."
files=$PWD/charts/ashlar/files
binaries=$(cd "$1" && pwd)
PATH=$binaries:$PATH
export PATH

work=$(mktemp -d "${TMPDIR:-/tmp}/ashlar-chart.XXXXXX")
started=
cleanup() {
    for pid in $started; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    ashlar dev --dir "$work/cluster" down --purge >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

fail() {
    echo "FAILED: $*" >&2
    tail -n 30 "$work"/*.log >&2 2>/dev/null || true
    exit 1
}
# Waits until a command succeeds, at most that many seconds.
eventually() {
    limit=$(($(date +%s) + $1))
    shift
    until "$@" >"$work/last" 2>&1; do
        [ "$(date +%s)" -lt "$limit" ] || { cat "$work/last" >&2; fail "not in time: $*"; }
        sleep 0.1
    done
}
refused() {
    if "$@" >"$work/last" 2>&1; then
        fail "should have been refused: $*"
    fi
}
passed() { echo "ok: $*"; }

ashlar dev --dir "$work/cluster" up --daemons 3 --members 3 --disk-size 1GiB >"$work/up.log" 2>&1 || fail "dev up"
eval "$(ashlar dev --dir "$work/cluster" env)"

# pool.sh
POOL=default REPLICAS=3 FAILURE_DOMAIN=node
export POOL REPLICAS FAILURE_DOMAIN
sh "$files/pool.sh" >"$work/pool.log" 2>&1 || fail "pool.sh does not make the pool"
ashlar pool show default >/dev/null || fail "there is no pool"
REPLICAS=2 sh "$files/pool.sh" >"$work/pool.log" 2>&1 || fail "pool.sh does not accept a pool that exists"
ashlar -o json pool show default | grep -q '"replicas": 3' || fail "pool.sh changed a pool that exists"
passed "the pool is made once and not changed"

# storage.sh
mkdir -p "$work/disks" "$work/ready"
truncate -s 128M "$work/disks/part-blank"
head -c 134217728 /dev/urandom >"$work/disks/part-foreign"
truncate -s 128M "$work/disks/part-filesystem"
/sbin/mkfs.ext4 -q "$work/disks/part-filesystem"
sums=$(cd "$work/disks" && sha256sum part-foreign part-filesystem)
serve() {
    ASHLAR_DISKS="$work/disks/part-*
$work/disks/nothing-*" ASHLAR_FILES="128MiB $work/disks/made/one" ASHLAR_ZONE=z7 ASHLAR_READY_DIR=$work/ready \
        sh "$files/storage.sh" --node-name=chart-node --data-dir="$work/node" --admin-listen=127.0.0.1:0 \
        --data-listen=127.0.0.1 --label=tier=fast >"$work/storage.log" 2>&1 &
    daemon=$!
    started="$started $daemon"
}
disks() { ashlar -o json disk list --node chart-node | grep '"path"\|"disk_id"\|"id"' | sort; }
two_disks() { [ "$(ashlar -o json disk list --node chart-node | grep -c '"path"')" = 2 ]; }
serve
eventually 30 two_disks
disks >"$work/disks.first"
grep -q part-blank "$work/disks.first" || fail "the blank disk is not served"
grep -q made/one "$work/disks.first" || fail "the file is not served"
[ "$(cd "$work/disks" && sha256sum part-foreign part-filesystem)" = "$sums" ] || fail "foreign data were changed"
grep -q "part-foreign is not used and was not changed" "$work/storage.log" || fail "nothing is said of the foreign disk"
ashlar -o json node show chart-node >"$work/last"
grep -q '"topology.kubernetes.io/zone": "z7"' "$work/last" || fail "the zone is not told"
grep -q '"tier": "fast"' "$work/last" || fail "the label is not told"
passed "blank disks are formatted, foreign ones are left as they are"
kill -TERM "$daemon"
wait "$daemon" || fail "storage-daemon does not end in order when the script is told to"
serve
eventually 30 two_disks
disks >"$work/disks.second"
cmp -s "$work/disks.first" "$work/disks.second" || fail "a restart made other disks"
passed "a restart formats nothing"

# storage-ready.sh, pre-upgrade.sh, pre-delete.sh
ready() { ASHLAR_READY_DIR=$work/ready ASHLAR_UPDATE_WAIT=$1 sh "$files/storage-ready.sh"; }
again() { rm -f "$work/ready/ready"; date +%s >"$work/ready/started"; }
ready 600 >"$work/last" 2>&1 || fail "not ready although nothing is missing"
[ -e "$work/ready/ready" ] || fail "readiness is not remembered"
sh "$files/pre-upgrade.sh" >"$work/last" 2>&1 || fail "an upgrade of a healthy cluster is refused"
sh "$files/pre-delete.sh" >"$work/last" 2>&1 || fail "uninstalling without volumes is refused"
ashlar volume create data --size 64MiB --preferred-node node-1 >/dev/null
refused sh "$files/pre-delete.sh"
grep -q "there are volumes" "$work/last" || fail "the refusal does not say why"
passed "uninstalling is refused while there are volumes"

nbd-client serve --volume data --socket "$work/data.sock" >"$work/client.log" 2>&1 &
client=$!
started="$started $client"
eventually 30 test -S "$work/data.sock"
eventually 30 sh "$files/pre-upgrade.sh"
# A daemon that holds a replica.
node=$(ashlar -o json replica list data | sed -n 's/.*"node": "\(node-[0-9]*\)".*/\1/p' | head -n 1)
ashlar dev --dir "$work/cluster" kill "daemon-${node#node-}" >/dev/null
degraded() { ashlar -o json cluster status | grep -q '"volumes_degraded": 1'; }
eventually 30 degraded
refused sh "$files/pre-upgrade.sh"
grep -q "lacks a replica" "$work/last" || fail "the refusal does not say why"
again
refused ready 600
ready 0 >"$work/last" 2>&1 || fail "the limit is not respected"
again
refused ready 600
ashlar dev --dir "$work/cluster" start "daemon-${node#node-}" >/dev/null
eventually 60 ready 600
eventually 30 sh "$files/pre-upgrade.sh"
passed "upgrades and updates wait for replicas"
kill -TERM "$client"
wait "$client" || true

ashlar volume delete data --yes >/dev/null
sh "$files/pre-delete.sh" >"$work/last" 2>&1 || fail "uninstalling without volumes is refused"

# nbd-client.sh, nbd-ready.sh: two pods on a node, as during an update.
ASHLAR_STATE_DIR=$work/nbd ASHLAR_NBD_SOCKET=$work/nbd.sock ASHLAR_NODE=chart-node ASHLAR_IDLE_POLL=0.2
export ASHLAR_STATE_DIR ASHLAR_NBD_SOCKET ASHLAR_NODE ASHLAR_IDLE_POLL
pod() {
    sh "$files/nbd-client.sh" --state-dir="$ASHLAR_STATE_DIR" >"$work/$1.log" 2>&1 &
    pod=$!
    started="$started $pod"
}
child_of() { cat "/proc/$1/task/$1/children"; }
has_nbd_client() { for pid in $(child_of "$1"); do case $(cat "/proc/$pid/comm") in nbd-client) return 0 ;; esac; done; return 1; }
pod old
old=$pod
eventually 30 sh "$files/nbd-ready.sh"
pod new
new=$pod
eventually 30 grep -q "everything is handed over; idle" "$work/old.log"
eventually 30 sh "$files/nbd-ready.sh"
kill -0 "$old" || fail "the old pod's container ended"
has_nbd_client "$new" || fail "the new pod has no nbd-client"
if has_nbd_client "$old"; then fail "the old pod still has an nbd-client"; fi
passed "the old container stays idle after the hand-over"
kill -TERM "$old"
wait "$old" || fail "the idle container does not end in order"
has_nbd_client "$new" || fail "the new pod lost its nbd-client with the old pod"
passed "the old pod is stopped without an effect"
pod third
third=$pod
eventually 30 grep -q "everything is handed over; idle" "$work/new.log"
kill -TERM "$third"
wait "$third" || true
refused sh "$files/nbd-ready.sh"
code=0
wait "$new" || code=$?
[ "$code" = 0 ] && grep -q "nobody has the devices" "$work/new.log" || fail "after a roll-back nobody takes the devices"
passed "after a roll-back the idle container ends, to be started again"
