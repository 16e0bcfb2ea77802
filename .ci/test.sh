#!/bin/sh
# `make test`: every step, a summary in the end, and a loud line for whatever was skipped.
# A skipped tool is an error under CI=true. Exit: 0 only if every step passed.
set -u
cd "$(dirname "$0")/.." || exit 1

target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
logs=$target/test-logs
rm -rf "$logs"
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
summary=$logs/summary
ASHLAR_SKIPPED_LOG=$logs/skipped
export ASHLAR_SKIPPED_LOG
: >"$summary"
: >"$ASHLAR_SKIPPED_LOG"
failed=0

# One step: NAME COMMAND... Its output goes to a log of its own, its verdict to the summary.
step() {
    name=$1
    shift
    begun=$(date +%s)
    if "$@" >"$logs/$name.log" 2>&1; then
        result=passed
    else
        result=FAILED
        : >"$logs/.failed"
    fi
    # What the step skipped on its own account.
    grep -h '^SKIPPED' "$logs/$name.log" >>"$ASHLAR_SKIPPED_LOG" 2>/dev/null
    line=$(printf '%-22s %-8s %5s s' "$name" "$result" "$(($(date +%s) - begun))")
    echo "$line" | tee -a "$summary"
    if [ "$result" = FAILED ]; then
        tail -n 60 "$logs/$name.log"
        echo "   (all of it: $logs/$name.log)"
    fi
}

# The build takes some 12 GiB; three lanes of clusters whose disks are allocated in full take some 25.
room() {
    build=$(du -sm "$target" | cut -f1)
    need=$((build < 12288 ? 12288 - build : 0))
    here=$(df -Pm "$target" | awk 'NR == 2 { print $4 }')
    there=$(df -Pm "${TMPDIR:-/tmp}" | awk 'NR == 2 { print $4 }')
    if [ "$here" -lt "$need" ]; then
        echo "the build needs $need MiB more in $target, and $here are free there"
        return 1
    fi
    if [ "$(df -P "$target" | awk 'NR == 2 { print $1 }')" = "$(df -P "${TMPDIR:-/tmp}" | awk 'NR == 2 { print $1 }')" ]; then
        there=$((there - need))
    fi
    if [ "$there" -lt 25600 ]; then
        echo "the tests' disks need 25 GiB in ${TMPDIR:-/tmp}, and only $there MiB are left there beside the build:"
        echo "make room, or name another directory with TMPDIR"
        return 1
    fi
}

# Always the same selection (--workspace): another one has other features of third-party crates, and builds everything again.
tests() {
    # One at a time: each starts whole clusters.
    name=$1
    shift
    step "$name" cargo test --workspace --locked --test "$name" -- --test-threads=1 "$@"
}
quiet=an_upgrade_by_hand_over_costs_less_than_a_second

# Tests side by side: they wait more than they compute. Each line is a lane; what is measured in parts of a second comes after them, alone.
lanes() {
    (for name in e2e_clients e2e_corruption e2e_crashes e2e_csi_controller e2e_readers $others; do tests "$name"; done) &
    (tests e2e_group_snapshots; tests e2e_node --skip "$quiet"; tests e2e_csi_sanity; tests e2e_postgres; tests e2e_schedule) &
    (tests e2e_csi_node; step chart .ci/chart.sh "$target/debug"; step images .ci/images.sh "$target/debug") &
    wait
}
known=" e2e_clients e2e_corruption e2e_crashes e2e_csi_controller e2e_readers e2e_node e2e_csi_sanity e2e_csi_node e2e_postgres e2e_group_snapshots e2e_schedule "
others=
for test in tests/tests/*.rs; do
    name=$(basename "$test" .rs)
    case $known in *" $name "*) ;; *) others="$others $name" ;; esac
done
units=
for test in */tests/*.rs; do
    case $test in tests/*) ;; *) units="$units --test $(basename "$test" .rs)" ;; esac
done

step room room
if [ -e "$logs/.failed" ]; then
    exit 1
fi
step tools .ci/install-tools.sh
step go-tools .ci/install-go-tools.sh
step format cargo fmt --all --check
step clippy cargo clippy --workspace --all-targets --locked -- -D warnings
# The end-to-end tests start the programs that lie beside them.
step build cargo build --workspace --all-targets --locked
# shellcheck disable=SC2086 # a list of arguments
step unit cargo test --workspace --locked --no-fail-fast --lib --bins $units
step documentation cargo test --workspace --locked --doc
lanes
step e2e_node_quiet cargo test --workspace --locked --test e2e_node -- "$quiet"

# Planted mistakes in the protocol must be caught; they are another build of the client.
step planted-mistakes cargo test --workspace --locked --features ashlar-tests/planted-bugs --test sim_seeds -- planted

count() {
    # "test result: ok. 3 passed; 0 failed; ..." of every runner
    grep -h '^test result' "$logs"/*.log | sed "s/.* \([0-9]*\) $1.*/\1/" | awk '{ n += $1 } END { print n + 0 }'
}

echo
echo "== summary"
cat "$summary"
if [ -s "$ASHLAR_SKIPPED_LOG" ]; then
    echo
    echo "!! NOT EVERYTHING WAS TESTED:"
    sort -u "$ASHLAR_SKIPPED_LOG" | sed 's/^/!! /'
    if [ "${CI:-}" = true ]; then
        echo "!! under CI=true that is an error"
        failed=1
    fi
fi
echo
echo "$(count passed) passed, $(count failed) failed"
if [ "$failed" -ne 0 ] || [ -e "$logs/.failed" ]; then
    echo "FAILED"
    exit 1
fi
echo "all passed"
