#!/bin/sh
# shellcheck disable=SC2086 # lists of package names are split on purpose
# Installs the Debian packages that the tests and the demonstration use. Quick when they are present.
# Usage: .ci/install-tools.sh [demo|images]
#   demo: only what `make demo` and `make bench` need; images: only what `.ci/images.sh` needs
set -eu

demo="fio libnbd-bin qemu-utils"
images="buildah debootstrap binutils"
all="$demo $images python3-libnbd nbd-client e2fsprogs xfsprogs user-mode-linux busybox kmod iproute2 util-linux postgresql postgresql-contrib python3-yaml shellcheck"

case "${1:-all}" in
demo) packages=$demo ;;
images) packages=$images ;;
all) packages=$all ;;
*) echo "usage: $0 [demo|images]" >&2; exit 2 ;;
esac

missing=
for package in $packages; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "SKIPPED installing$missing: this is no Debian; install them by hand" >&2
    [ "${CI:-}" != true ]
    exit
fi
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "SKIPPED installing$missing: not root (run: sudo $0)" >&2
        [ "${CI:-}" != true ]
        exit
    fi
    root="sudo -n"
else
    root=
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
# One by one if they do not come together: one package that a release lacks must not cost the others.
$root apt-get update -qq || true
if ! $root apt-get install -y -qq --no-install-recommends $missing >/dev/null; then
    failed=
    for package in $missing; do
        $root apt-get install -y -qq --no-install-recommends "$package" >/dev/null || failed="$failed $package"
    done
    if [ -n "$failed" ]; then
        echo "SKIPPED: these packages could not be installed:$failed" >&2
        [ "${CI:-}" != true ]
        exit
    fi
fi
