#!/bin/sh
# The chart: lint, rendering, schemas of Kubernetes, what the values' schema must refuse, flags and paths against the
# programs, metrics against their reference, the scripts with real programs.
# Usage: .ci/chart.sh [DIRECTORY_OF_PROGRAMS]
set -eu
cd "$(dirname "$0")/.."
programs=${1:-${CARGO_TARGET_DIR:-target}/debug}
chart=charts/ashlar
# Helm built from its module does not know a current version of Kubernetes by itself.
version=1.36.3
out=${CARGO_TARGET_DIR:-target}/chart
mkdir -p "$out"
passed=0

skip() {
    echo "SKIPPED $1" >&2
    [ "${CI:-}" != true ]
    exit
}
fail() {
    echo "FAILED: $1" >&2
    exit 1
}
ok() {
    passed=$((passed + 1))
    echo "ok: $1"
}
render() {
    name=$1
    shift
    helm template ashlar $chart --namespace ashlar-system --kube-version $version "$@" >"$out/$name.yaml" 2>"$out/$name.err"
}

.ci/install-go-tools.sh helm kubeconform
PATH=$(.ci/install-go-tools.sh --directory):$PATH
command -v helm >/dev/null || skip "the chart: there is no helm"
command -v kubeconform >/dev/null || skip "the chart: there is no kubeconform"
python3 -c 'import yaml' 2>/dev/null || PATH=/usr/bin:$PATH
python3 -c 'import yaml' || skip "the chart: python3 has no yaml (Debian: python3-yaml)"

# --- it renders ---
for values in "" "--values $chart/ci/full-values.yaml"; do
    # shellcheck disable=SC2086 # one argument or two
    helm lint --strict --kube-version $version $chart $values >"$out/lint" || fail "lint: $(cat "$out/lint")"
done
ok "helm lint, with default and with full values"
render default || fail "$(cat "$out/default.err")"
render full --values $chart/ci/full-values.yaml || fail "$(cat "$out/full.err")"
render full-ipv6 --values $chart/ci/full-values.yaml --set ipFamily=IPv6 || fail "$(cat "$out/full-ipv6.err")"
helm template ashlar $chart --namespace ashlar-system --kube-version 1.31.0 >"$out/oldest.yaml"
if helm template ashlar $chart --kube-version 1.30.0 >/dev/null 2>&1; then fail "accepted: Kubernetes 1.30"; fi
# The two commands of docs/kubernetes.md.
render quick --set 'metadata.persistence.type=hostPath,metadata.persistence.hostPath.nodes={a,b,c}' \
    --set 'storage.disks={/dev/nvme1n1}' || fail "$(cat "$out/quick.err")"
ok "helm template, with default, full, IPv6 and the documents' values"
helm show values $chart | python3 -c 'import sys, yaml; yaml.safe_load(sys.stdin)'
helm template ashlar $chart --namespace ashlar-system --kube-version $version --show-only templates/NOTES.txt >/dev/null 2>&1 || true

# --- Kubernetes would take it ---
if .ci/kubernetes-schemas.sh "$out/schemas"; then
    conform() {
        # The description of SnapshotMetadataService is in no module of the proxy.
        kubeconform -skip SnapshotMetadataService -strict -summary -schema-location "$out/schemas/{{ .ResourceKind }}{{ .KindSuffix }}.json" "$@"
    }
    conform "$out/default.yaml" "$out/full.yaml" "$out/full-ipv6.yaml" "$out/quick.yaml" "$out/oldest.yaml" || fail "kubeconform"
    ok "kubeconform -strict, custom resources included"
    sed 's/maxSurge/maxSurges/' "$out/default.yaml" >"$out/wrong.yaml"
    if conform "$out/wrong.yaml" >/dev/null; then fail "kubeconform accepts a misspelt field"; fi
    sed 's/^  groups:$/  group:/' "$out/full.yaml" >"$out/wrong.yaml"
    if conform "$out/wrong.yaml" >/dev/null; then fail "kubeconform accepts a misspelt field of a PrometheusRule"; fi
    ok "kubeconform refuses a misspelt field"
else
    skip "kubeconform: the API descriptions of Kubernetes could not be fetched"
fi

# --- values that must be refused, and why ---
refused() {
    wanted=$1
    shift
    if render refused "$@"; then fail "accepted: $*"; fi
    grep -q -- "$wanted" "$out/refused.err" || fail "$* is refused, but with: $(cat "$out/refused.err")"
}
additional="additional propert"
# Every object of the values refuses a key that it does not know.
python3 .ci/chart_objects.py $chart/values.yaml >"$out/objects"
while read -r path; do
    refused "$additional" --set "${path}typo=1"
done <"$out/objects"
refused "$additional" --set storageClasses[0].name=x,storageClasses[0].parameters.replica=3
refused "$additional" --set storage.groups[0].name=x,storage.groups[0].nodeSelector.a=b,storage.groups[0].disk=/dev/sdb
refused "nodeSelector" --set storage.groups[0].name=x,'storage.groups[0].disks={/dev/sdb}'
refused "disks" --set 'storage.disks={sdb}'
refused "members" --set metadata.members=2
refused "members" --set metadata.members=three
refused "fstype" --set 'storageClasses[0].name=x,storageClasses[0].parameters.csi\.storage\.k8s\.io/fstype=btrfs'
refused "replicas" --set storageClasses[0].name=x,storageClasses[0].parameters.replicas=6
refused "disks" --set 'storage.groups[0].name=x,storage.groups[0].nodeSelector.a=b,storage.groups[0].disks={sdb}'
refused "digest" --set image.node.digest=latest
refused "does not need metadata" --set storageClasses[0].name=x,storageClasses[0].default=true,storageClasses[0].parameters.pool=a
refused "kubeletDir" --set csi.kubeletDir=var/lib/kubelet
refused "port" --set metadata.port=70000
# What the templates refuse.
refused "initialMembers" --set metadata.members=1
refused "must name 3 nodes" --set metadata.persistence.type=hostPath
refused "a node twice" --set 'metadata.persistence.type=hostPath,metadata.persistence.hostPath.nodes={a,a,b}'
refused "nodeCIDRs is needed" --set networkPolicies.enabled=true
refused "needs metrics.enabled" --set metrics.enabled=false,metrics.serviceMonitor.enabled=true
refused "needs snapshots.enabled" --set snapshotMetadata.enabled=true
refused "tlsSecretName" --set snapshotMetadata.enabled=true,snapshots.enabled=true
refused "only one class" --values $chart/ci/full-values.yaml --set storageClasses[1].default=true,storageClasses[1].name=x,storageClasses[1].parameters.pool=a --set storageClasses[0].default=true,storageClasses[0].name=y,storageClasses[0].parameters.pool=a
ok "misspelt keys ($(wc -l <"$out/objects") objects) and wrong values are refused, with the reason"

# --- safety of upgrades, in what is rendered ---
python3 .ci/chart_rules.py "$out/default.yaml" "$out/full.yaml" || fail "rules of the chart"
ok "least privilege, hand-over and persistence are as they must be"

# --- metrics ---
python3 .ci/chart_metrics.py docs/metrics.md "$out/full.yaml" || fail "metrics of rules and dashboard"
if [ -f docs/metrics.md ]; then
    sed 's/ashlar_metadata_is_leader/ashlar_metadata_is_leading/' "$out/full.yaml" >"$out/wrong.yaml"
    if python3 .ci/chart_metrics.py docs/metrics.md "$out/wrong.yaml" >/dev/null; then fail "not noticed: a misspelt metric"; fi
fi
ok "metrics of rules and dashboard"

# --- programs ---
python3 .ci/chart_flags.py "$programs" "$out/default.yaml" "$out/full.yaml" "$out/quick.yaml" -- \
    docs/kubernetes.md docs/troubleshooting.md docs/storage-class.md README.md || fail "flags and paths"
for wrong in 's/--capacity-ownerref-level/--capacity-owner-level/' 's/--data-listen=/--data-listens=/' 's/storage.sh, run/storages.sh, run/' 's/--endpoint=unix:\/\/\/csi/--endpoint=unix:\/\/\/cis/'; do
    sed "$wrong" "$out/default.yaml" >"$out/wrong.yaml"
    if python3 .ci/chart_flags.py "$programs" "$out/wrong.yaml" >/dev/null; then fail "not noticed: $wrong"; fi
done
ok "every flag and path is known to the programs"

if command -v shellcheck >/dev/null; then
    shellcheck $chart/scripts/*.sh .ci/chart*.sh .ci/kubernetes-schemas.sh .ci/install-go-tools.sh || fail "shellcheck"
    ok "shellcheck"
fi
.ci/chart_scripts.sh "$programs"
echo "chart: $passed passed"
