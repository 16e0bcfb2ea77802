#!/bin/sh
# Writes JSON schemas for kubeconform -strict, made from the API descriptions of Kubernetes, of the Prometheus
# operator and of external-snapshotter. They come as Go modules, pinned here and checked by Go's sum database.
# Usage: .ci/kubernetes-schemas.sh DIRECTORY      quick when they are there
set -eu
cd "$(dirname "$0")/.."
directory=${1:?directory}
kubernetes=k8s.io/kubernetes@v1.36.3
prometheus=github.com/prometheus-operator/prometheus-operator@v0.85.0
snapshotter=github.com/kubernetes-csi/external-snapshotter/client/v8@v8.6.0

made="$kubernetes $prometheus $snapshotter $(cat .ci/kubernetes_schemas.py .ci/kubernetes-schemas.sh | cksum)"
if [ "$(cat "$directory/made" 2>/dev/null)" = "$made" ]; then
    exit
fi
# Where a module lies, fetched if need be.
module() {
    GOFLAGS=-mod=mod go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p'
}
mkdir -p "$directory"
rm -f "$directory"/*.json "$directory/made"
python3 .ci/kubernetes_schemas.py "$directory" \
    "$(module $kubernetes)/api/openapi-spec/swagger.json" \
    "$(module $prometheus)/example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml" \
    "$(module $prometheus)/example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml" \
    "$(module $snapshotter)/config/crd/snapshot.storage.k8s.io_volumesnapshotclasses.yaml" \
    "$(module $snapshotter)/config/crd/groupsnapshot.storage.k8s.io_volumegroupsnapshotclasses.yaml"
echo "$made" >"$directory/made"
