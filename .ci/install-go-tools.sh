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
'

if ! command -v go >/dev/null; then
    echo "SKIPPED the Go tools: there is no go command; install Go 1.26 or newer" >&2
    [ "${CI:-}" != true ]
    exit
fi

wanted=" ${*:-all} "
echo "$tools" | while read -r name package version; do
    [ -n "$name" ] || continue
    case $wanted in
    " all " | *" $name "*) ;;
    *) continue ;;
    esac
    # The stamp says which version lies there, so that a new pin is installed.
    stamp=$directory/.$name
    if [ -x "$directory/$name" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$package@$version" ]; then
        continue
    fi
    echo "installing $name $version"
    GOBIN=$directory GOFLAGS=-buildvcs=false go install "$package@$version"
    echo "$package@$version" >"$stamp"
done
