#!/bin/sh
# Installs the Go programs that the tests use, each at a pinned version, into one directory.
# Usage: .ci/install-go-tools.sh [NAME...]      installs (all, or those named); quick when they are there
#        .ci/install-go-tools.sh --directory    prints the directory
# Another directory: ASHLAR_GO_TOOLS. A tool is added with one line in the table.
set -eu
cd "$(dirname "$0")/.."

directory=${ASHLAR_GO_TOOLS:-${CARGO_TARGET_DIR:-target}/go-tools}
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
if [ "${1:-}" = --directory ]; then
    echo "$directory"
    exit
fi

# name         package                                  version
tools='
helm           helm.sh/helm/v3/cmd/helm                 v3.22.0
kubeconform    github.com/yannh/kubeconform/cmd/kubeconform  v0.8.0
versitygw      github.com/versity/versitygw/cmd/versitygw  v1.8.0
csi-sanity     github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity  v5.6.0
'
# Programs of this repository: name, directory of its module.
own='
csi-client     tests/go/csi-client
'
if ! command -v go >/dev/null; then
    echo "SKIPPED the Go tools: there is no go command; install Go 1.26 or newer" >&2
    [ "${CI:-}" != true ]
    exit
fi

wanted=" ${*:-all} "
is_wanted() {
    [ -n "$1" ] || return 1
    case $wanted in
    " all " | *" $1 "*) ;;
    *) return 1 ;;
    esac
}

failures=$directory/.failed
: >"$failures"
failed() {
    echo "SKIPPED $1: $2 could not be had; the tests that need it are skipped" >&2
    echo "$1" >>"$failures"
}

echo "$tools" | while read -r name package version; do
    is_wanted "$name" || continue
    # The stamp says which version lies there, so that a new pin is installed.
    stamp=$directory/.$name
    if [ -x "$directory/$name" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$package@$version" ]; then
        continue
    fi
    echo "installing $name $version"
    if GOBIN=$directory GOFLAGS=-buildvcs=false go install "$package@$version"; then
        echo "$package@$version" >"$stamp"
    else
        failed "$name" "$package@$version"
    fi
done

echo "$own" | while read -r name module; do
    is_wanted "$name" || continue
    # The go command's own cache makes this quick when nothing changed.
    (cd "$module" && go build -buildvcs=false -o "$directory/$name" .) || failed "$name" "its dependencies"
done

[ ! -s "$failures" ] || [ "${CI:-}" != true ]
