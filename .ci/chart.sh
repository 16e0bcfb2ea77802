#!/bin/sh
# Tests charts/ashlar: what it renders is valid Kubernetes, what is mistyped is refused, and what it starts exists.
# Usage: .ci/chart.sh [DIRECTORY OF BINARIES]     (default: the debug build)
set -eu
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
binaries=${1:-$target/debug}
chart=charts/ashlar
for program in metadata-raft storage-daemon nbd-client csi-driver ashlar; do
    [ -x "$binaries/$program" ] || { echo "$binaries/$program is missing: cargo build --workspace --bins" >&2; exit 1; }
done

if ! command -v go >/dev/null; then
    echo "SKIPPED chart: there is no go command to get helm with" >&2
    [ "${CI:-}" != true ]
    exit
fi
.ci/install-go-tools.sh helm kubeconform
tools=$(.ci/install-go-tools.sh --directory)
PATH=$tools:$PATH
export PATH
# A python that has yaml: the first in the path, or the distribution's.
python=python3
"$python" -c 'import yaml' 2>/dev/null || python=/usr/bin/python3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "-- lint"
helm lint --strict "$chart"
helm lint --strict "$chart" -f $chart/ci/full-values.yaml

echo "-- render"
hostpath="--set metadata.persistence.type=hostPath --set metadata.persistence.nodes={a,b,c}"
for kubernetes in 1.31.0 1.36.3; do
    helm template ashlar "$chart" --namespace ashlar-system --kube-version $kubernetes >"$work/default-$kubernetes.yaml"
    # shellcheck disable=SC2086 # a list of words
    helm template ashlar "$chart" --namespace ashlar-system --kube-version $kubernetes $hostpath >"$work/hostpath-$kubernetes.yaml"
    helm template other "$chart" --namespace elsewhere --kube-version $kubernetes -f $chart/ci/full-values.yaml \
        >"$work/full-$kubernetes.yaml"
done
if helm template ashlar "$chart" --kube-version 1.30.0 >/dev/null 2>&1; then
    echo "Kubernetes 1.30 should have been refused" >&2
    exit 1
fi

echo "-- schemas"
schemas=$tools/../kubernetes-schemas
mkdir -p "$schemas"
"$python" .ci/chart/schemas.py "$schemas"
kubeconform -strict -summary -schema-location "$schemas/{{.ResourceKind}}{{.KindSuffix}}.json" "$work"/*.yaml
# The check itself must see: a field that does not exist, and a value of a wrong type.
for mistake in 's/minReadySeconds:/minReadySecond:/' 's/podManagementPolicy: Parallel/podManagementPolicy: [Parallel]/' \
    's/deletionPolicy:/deletePolicy:/'; do
    sed "$mistake" "$work/full-1.36.3.yaml" >"$work/mistake.yaml"
    if kubeconform -strict -schema-location "$schemas/{{.ResourceKind}}{{.KindSuffix}}.json" "$work/mistake.yaml" >/dev/null 2>&1; then
        echo "kubeconform does not see $mistake" >&2
        exit 1
    fi
done

echo "-- values that must be refused"
"$python" .ci/chart/refusals.py "$chart"

echo "-- programs, flags and variables"
"$python" .ci/chart/flags.py "$binaries" "$work"/*-1.36.3.yaml
for mistake in 's/--advertise=/--advertize=/' 's/--mode=node/--modus=node/' 's,/usr/local/bin/csi-driver,/usr/local/bin/csi-drive,' \
    's/--leader-election$/--leader-elections/' 's/name: ASHLAR_NODE$/name: ASHLAR_NODES/' 's/pool create/pool make/' \
    '/--data=/d' 's/--timeout 5 pool show/--time 5 pool show/'; do
    sed "$mistake" "$work/default-1.36.3.yaml" >"$work/mistake.yaml"
    if "$python" .ci/chart/flags.py "$binaries" "$work/mistake.yaml" >/dev/null 2>&1; then
        echo "flags.py does not see $mistake" >&2
        exit 1
    fi
done

echo "-- scripts"
.ci/chart/scripts.sh "$binaries"
