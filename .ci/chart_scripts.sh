#!/bin/sh
# Tests of the chart's scripts with the real programs: disks of a node as files, a small cluster for the checks.
# Usage: .ci/chart_scripts.sh DIRECTORY_OF_PROGRAMS
set -eu
cd "$(dirname "$0")/.."
programs=$(cd "$1" && pwd)
scripts=$PWD/charts/ashlar/scripts
mkdir -p "${CARGO_TARGET_DIR:-target}"
work=$(mktemp -d "${CARGO_TARGET_DIR:-target}/chart-scripts.XXXXXX")
work=$(cd "$work" && pwd)
PATH=$programs:$PATH
export PATH
TERMINATION_LOG=$work/termination
export TERMINATION_LOG
passed=0

finish() {
    code=$?
    [ ! -d "$work/dev" ] || ashlar dev down --purge --dir "$work/dev" >/dev/null 2>&1 || true
    [ -z "${server:-}" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
ok() {
    passed=$((passed + 1))
    echo "ok: $1"
}
fail() {
    echo "FAILED: $1" >&2
    exit 1
}
# Waits for a command to succeed.
eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || fail "never came true: $*"
        sleep 0.1
    done
}

# --- disks.sh ---------------------------------------------------------------------------------------------------
nodes=$work/nodes
mkdir -p "$nodes" "$work/data"
size=134217728
for name in blank-a blank-b ashlar foreign-start foreign-end kept; do
    truncate -s $size "$nodes/$name"
done
storage-daemon format "$nodes/ashlar" >/dev/null 2>&1
printf 'a file system' | dd of="$nodes/foreign-start" bs=1 seek=1080 conv=notrunc 2>/dev/null
printf 'a raid' | dd of="$nodes/foreign-end" bs=1 seek=$((size - 4096)) conv=notrunc 2>/dev/null
foreign=$(cksum "$nodes"/foreign-* "$nodes/kept")
identity=$(storage-daemon inspect --json "$nodes/ashlar" 2>/dev/null)

disks() {
    DISKS=$1 EXCLUDE=$2 DATA_DIR=$work/data LIST=$work/list sh "$scripts/disks.sh" >"$work/said" 2>&1
}
disks "$nodes/* $nodes/missing" "$nodes/kept"
expected=$(printf '%s\n' "$nodes/ashlar" "$nodes/blank-a" "$nodes/blank-b")
[ "$(cat "$work/list")" = "$expected" ] || fail "the list is: $(cat "$work/list" "$work/said")"
ok "blank disks and Ashlar disks are taken, others not"
[ "$(cksum "$nodes"/foreign-* "$nodes/kept")" = "$foreign" ] || fail "foreign or excluded data were changed"
ok "foreign and excluded disks are not touched"
[ "$(storage-daemon inspect --json "$nodes/ashlar" 2>/dev/null)" = "$identity" ] || fail "an Ashlar disk was changed"
ok "an Ashlar disk is not formatted again"
for what in foreign-start foreign-end missing; do
    grep -q "^LEFT ALONE: .*$what" "$work/said" || fail "nothing is said about $what: $(cat "$work/said")"
done
ok "what is left alone is said, with the reason"
blank=$(storage-daemon inspect --json "$nodes/blank-a" 2>/dev/null)
disks "$nodes/blank-?" ""
[ "$(storage-daemon inspect --json "$nodes/blank-a" 2>/dev/null)" = "$blank" ] || fail "formatted twice"
[ "$(wc -l <"$work/list")" = 2 ] || fail "the second run lists: $(cat "$work/list")"
ok "the script may be repeated"
ln -s "$nodes/blank-a" "$work/by-id"
disks "$work/by-id $nodes/blank-a" ""
[ "$(cat "$work/list")" = "$nodes/blank-a" ] || fail "a disk with two names: $(cat "$work/list")"
ok "a disk with two names is taken once"
printf '{ "disks": [ { "path": "%s" } ] }\n' "$nodes/foreign-start" >"$work/data/node.json"
disks "$nodes/foreign-start" ""
[ "$(cat "$work/list")" = "$nodes/foreign-start" ] || fail "a disk that was served is forgotten"
ok "a disk that was served before stays listed, so that the daemon reports it"
disks "" ""
[ ! -s "$work/list" ] || fail "no disks, yet: $(cat "$work/list")"
ok "no disks are no error"

# --- nbd-client.sh: who serves when, with a program that stands in for the real one (its own tests need a kernel)
fake=$work/fake
mkdir -p "$fake" "$work/state"
cat >"$fake/nbd-client" <<'FAKE'
#!/bin/sh
# Takes the lock as the real one does; ends well when the file "successor" appears: the hand-over.
[ "$1" = node ] || exit 0
exec 9>"$STATE_DIR/lock"
flock 9
echo "started $$ $*" >>"$STATE_DIR/events"
trap 'echo "terminated $$" >>"$STATE_DIR/events"; exit 0' TERM
while [ ! -e "$STATE_DIR/successor" ] && [ ! -e "$STATE_DIR/crash" ]; do
    sleep 0.1 9>&-
done
[ ! -e "$STATE_DIR/crash" ] || exit 3
FAKE
chmod +x "$fake/nbd-client"
export STATE_DIR="$work/state" SOCKET="$work/state/socket"
: >"$STATE_DIR/events"
starts() {
    [ "$(grep -c started "$STATE_DIR/events")" = "$1" ]
}
# Somebody listens on the first port, as the predecessor does in an upgrade.
mkfifo "$work/pipe"
python3 -c '
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
' <"$work/pipe" >"$work/port" &
exec 7>"$work/pipe"
eventually test -s "$work/port"
METRICS="127.0.0.1:$(cat "$work/port") 127.0.0.1:1"
export METRICS
PATH=$fake:$PATH sh "$scripts/nbd-client.sh" run 2>"$work/wrapper" 7>&- &
server=$!
eventually starts 1
(
    # The successor, as far as the script sees it.
    touch "$STATE_DIR/successor"
    exec 8>"$STATE_DIR/lock"
    flock 8
    : >"$work/taken"
    while [ ! -e "$work/successor-ends" ]; do sleep 0.1 8>&-; done
) &
eventually test -e "$work/taken"
rm "$STATE_DIR/successor"
eventually grep -q "handed over" "$work/wrapper"
eventually pgrep -P "$server" -x flock
starts 1 || fail "started again beside its successor"
grep -q -- "--metrics=127.0.0.1:1\$" "$STATE_DIR/events" || fail "metrics: $(cat "$STATE_DIR/events")"
exec 7>&-
ok "metrics are on the port that is free"
ok "after a hand-over it waits and does not take the devices back"
touch "$work/successor-ends"
eventually starts 2
ok "when the successor is gone, it serves again"
kill -TERM "$server"
wait "$server" || fail "SIGTERM ended it with $?"
server=
grep -q terminated "$STATE_DIR/events" || fail "the program was not told to end"
ok "SIGTERM is passed on, and is no error"
touch "$STATE_DIR/crash"
if PATH=$fake:$PATH sh "$scripts/nbd-client.sh" run 2>/dev/null; then fail "a crash was taken for a hand-over"; fi
ok "a crash ends the container, so that it is started anew"
# As in a pod: only its own processes are in sight.
pod() {
    unshare --pid --fork --mount-proc env PATH="$fake:$PATH" sh -c "$1"
}
if pod true 2>/dev/null; then
    script="sh '$scripts/nbd-client.sh' ready 2>/dev/null"
    flock "$STATE_DIR/lock" sleep 60 &
    server=$!
    if pod "$script"; then fail "ready with another pod's lock"; fi
    kill "$server"
    wait "$server" || true
    server=
    pod "exec 9>'$STATE_DIR/lock'; flock 9; $script" || fail "not ready with its own lock"
    ok "ready only with its own lock"
else
    echo "SKIPPED the readiness of nbd-client's pod: no process namespaces here" >&2
fi

# --- hooks.sh, metadata.sh, storage.sh against a cluster ------------------------------------------------------------
port=$(python3 -c 'import random; print(random.randrange(12000, 28000, 40))')
ashlar dev up --dir "$work/dev" --disk-size 256MiB --base-port "$port" >/dev/null
eval "$(ashlar dev env --dir "$work/dev")"
export ASHLAR_METADATA
hooks() {
    (
        export FORCE="${2:-false}" POOL=main REPLICAS=3 FAILURE_DOMAIN=node WAIT_SECONDS=60
        sh "$scripts/hooks.sh" "$1" >"$work/said" 2>&1
    )
}
guard() {
    mkdir -p "$work/member"
    MEMBER_ID=$1 INITIAL_MEMBERS=3 BOOTSTRAP='' DATA=$work/member sh "$scripts/metadata.sh" guard >"$work/said" 2>&1
}
guard 1 || fail "a member of a new cluster may not start: $(cat "$work/said")"
ok "an empty member of a cluster without pools starts"
hooks post-install || fail "post-install: $(cat "$work/said")"
ashlar pool show main >/dev/null || fail "there is no pool"
hooks post-install || fail "post-install again: $(cat "$work/said")"
ok "the pool is made once"
if guard 2; then fail "an empty member of a cluster in use may start"; fi
guard 4 || fail "a new member may not join: $(cat "$work/said")"
touch "$work/member/log"
guard 2 || fail "a member with its data may not start: $(cat "$work/said")"
ok "a member that lost its data is kept from starting"
hooks pre-upgrade || fail "pre-upgrade of a sound cluster: $(cat "$work/said")"
hooks pre-delete || fail "pre-delete of an empty cluster: $(cat "$work/said")"
ok "a sound, empty cluster may be upgraded and deleted"
ready() {
    printf '%s\n' one >"$work/list"
    date +%s >"$work/begun"
    rm -f "$work/settled"
    LIST=$work/list NODE_NAME=node-1 RESYNC_WAIT_SECONDS=${1:-600} sh "$scripts/storage.sh" ready >"$work/said" 2>&1
}
ready || fail "a node in sync is not ready: $(cat "$work/said")"
ashlar volume create first --size 64MiB --wait >/dev/null
if hooks pre-delete; then fail "deleted with a volume"; fi
grep -q "REFUSED: 1 volumes exist" "$work/said" || fail "it says: $(cat "$work/said")"
hooks pre-delete true || fail "force does not help"
ok "a cluster with volumes is not deleted, unless forced"
nbd-client serve --volume first --socket "$work/first.sock" >/dev/null 2>&1 &
server=$!
eventually test -S "$work/first.sock"
ashlar dev kill daemon-1 --dir "$work/dev" >/dev/null
# Degraded once the holder has excluded the dead replica, which a write or its lease makes it notice.
degraded() {
    ashlar --output json cluster status | tr -d ' \n' | grep -q '"volumes_degraded":1'
}
eventually degraded
if hooks pre-upgrade; then fail "upgraded with a degraded volume"; fi
grep -q "^REFUSED: 1 volumes are degraded" "$work/said" || fail "it says: $(cat "$work/said")"
if ready; then fail "a dead node is ready"; fi
ready 0 || fail "it waits for ever: $(cat "$work/said")"
hooks pre-upgrade true || fail "force does not help"
ok "a degraded cluster is not upgraded, unless forced; a node is ready when its replicas are in sync"
ashlar dev start daemon-1 --dir "$work/dev" >/dev/null
eventually ready
eventually hooks pre-upgrade
ok "after the resync both go on"
ASHLAR_METADATA=127.0.0.1:1
if hooks pre-delete || hooks pre-upgrade; then fail "went on without an answer of the cluster"; fi
ok "no answer of the cluster is no permission"

echo "chart scripts: $passed passed"
