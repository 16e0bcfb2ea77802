#!/bin/sh
# `make test`: every step, a summary in the end, and a loud line for whatever was skipped.
# A skipped tool is an error under CI=true. Exit: 0 only if every step passed.
set -u
cd "$(dirname "$0")/.."

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

step() {
    name=$1
    shift
    printf '== %s\n' "$name"
    begun=$(date +%s)
    if "$@" >"$logs/$name.log" 2>&1; then
        result=passed
    else
        result=FAILED
        failed=1
        tail -n 60 "$logs/$name.log"
        echo "   (all of it: $logs/$name.log)"
    fi
    # What the step skipped on its own account.
    grep -h '^SKIPPED' "$logs/$name.log" >>"$ASHLAR_SKIPPED_LOG" 2>/dev/null
    printf '%-22s %-8s %5s s\n' "$name" "$result" "$(($(date +%s) - begun))" >>"$summary"
}

step tools .ci/install-tools.sh
step go-tools .ci/install-go-tools.sh
step format cargo fmt --all --check
step clippy cargo clippy --workspace --all-targets --locked -- -D warnings
# The end-to-end tests start the programs that lie beside them.
step build cargo build --workspace --bins --locked
step unit cargo test --workspace --locked --exclude ashlar-tests
step simulation cargo test -p ashlar-tests --locked --lib
for test in tests/tests/*.rs; do
    name=$(basename "$test" .rs)
    # One at a time: each starts whole clusters and looks at times.
    step "$name" cargo test -p ashlar-tests --locked --test "$name" -- --test-threads=1
done
step chart .ci/chart.sh "$target/debug"

# Planted mistakes in the protocol must be caught; they are another build of the client.
step planted-mistakes cargo test -p ashlar-tests --locked --features planted-bugs --test sim_seeds -- planted

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
if [ "$failed" -ne 0 ]; then
    echo "FAILED"
    exit 1
fi
echo "all passed"
