#!/bin/sh
# The images of the Dockerfile: builds both on a Debian made here, without a container engine, and looks into them.
# Usage: .ci/images.sh [DIRECTORY_OF_PROGRAMS]      checks images of programs that are already built
#        .ci/images.sh compile [DIRECTORY]          compiles in a builder made here (with this machine's Rust), then
#                                                   checks, and writes the images there as OCI archives
# Needs root. Packages come from where this machine's apt has them, through its proxy; ASHLAR_DEBIAN_MIRROR: from there
# instead. The images do not show any of that: their own apt asks Debian.
set -eu
cd "$(dirname "$0")/.."

suite=bookworm
mode=check
programs=${1:-${CARGO_TARGET_DIR:-target}/debug}
if [ "${1:-}" = compile ]; then
    mode=compile
    shift
    destination=${1:-${CARGO_TARGET_DIR:-target}/images/out}
    mkdir -p "$destination"
    destination=$(cd "$destination" && pwd)
fi
work=${CARGO_TARGET_DIR:-target}/images
mkdir -p "$work"
work=$(cd "$work" && pwd)
# After so many days the base is made again, and with it everything on top.
days_max=30
# Bounds in MiB: the base, what ashlar-node's packages add to it, and the programs of one image.
base_max=110
packages_max=110
programs_max=56

skip() {
    echo "SKIPPED the images: $1" >&2
    [ "${CI:-}" != true ]
    exit
}
fail() {
    echo "FAILED: $1" >&2
    exit 1
}
ok() {
    echo "ok: $1"
}

[ "$(id -u)" -eq 0 ] || skip "only root can make them here"
.ci/install-tools.sh images
for tool in buildah debootstrap strip; do
    command -v $tool >/dev/null || skip "there is no $tool"
done

# Nothing of this is a service, and nothing leaves the directory of the target.
buildah() {
    command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}
# With the machine's own network, DNS and sources of packages, as apt has them.
build() {
    # shellcheck disable=SC2086 # options
    buildah bud --isolation chroot --network host --layers --format oci --quiet $apt_options \
        --build-arg "BASE=localhost/ashlar-base:$suite" "$@" >/dev/null
}
trees=
# Containers, those of a run that was killed, too, and layers of what was built before: else the storage, where each is a
# whole copy, grows with every run.
tidy_up() {
    [ -d "$work/storage" ] || return 0
    buildah rm --all >/dev/null 2>&1 || true
    buildah rmi --prune >/dev/null 2>&1 || true
}
cleanup() {
    code=$?
    tidy_up
    for tree in $trees; do rm -rf "$tree"; done
    exit $code
}
trap cleanup EXIT
trap 'exit 1' INT TERM
# A container of IMAGE; its name is in $container, its tree in $tree.
from() {
    container=$(buildah from --pull-never "$1")
    tree=$(buildah mount "$container")
}
# Runs the shell's standard input in the container, as the image's user; arguments are options.
inside() {
    buildah run --isolation chroot --network host "$@" "$container" -- /bin/sh -eu
}

# --- where packages come from: never a part of an image ---
debian_sources() {
    for part in "debian $suite" "debian $suite-updates" "debian-security $suite-security"; do
        echo "deb http://deb.debian.org/$part main"
    done
}
# Those of this machine's apt, if it has this Debian. (Not with a password in them: that would come into logs.)
machine_sources() {
    # shellcheck disable=SC2016 # for apt-get
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v s=$suite '$1 == "Debian" && $3 == "main" && $4 ~ "^https?://[^@]*$" &&
            ($2 == s || $2 == s "-updates" || $2 == s "-security") { print "deb", $4, $2, "main" }' | sort -u
}
sources=$work/sources.list
if [ -n "${ASHLAR_DEBIAN_MIRROR:-}" ]; then
    echo "deb $ASHLAR_DEBIAN_MIRROR $suite main" >"$sources"
else
    machine_sources >"$sources"
fi
mirror=$(awk -v s=$suite '$3 == s { print $2; exit }' "$sources")
[ -n "$mirror" ] || debian_sources >"$sources"
apt_options="--volume $sources:/etc/apt/sources.list:ro"
# Whom this machine trusts, apt in there trusts.
if grep -q ' https:' "$sources" && [ -d /etc/ssl/certs ]; then
    apt_options="$apt_options --volume /etc/ssl/certs:/etc/ssl/certs:ro"
fi
# buildah and debootstrap take the proxy from the environment.
for scheme in http https; do
    proxy=
    eval "$(apt-config shell proxy "Acquire::$scheme::Proxy")"
    case $proxy in
    '' | DIRECT) ;;
    *) eval "[ -n \"\${${scheme}_proxy:-}\" ] || export ${scheme}_proxy=\"\$proxy\"" ;;
    esac
done

# --- a base like debian:bookworm-slim ---
make_base() {
    tree=$work/debootstrap
    trees="$trees $tree"
    rm -rf "$tree"
    # shellcheck disable=SC2086 # no argument or one
    debootstrap --variant=minbase $suite "$tree" $mirror >"$work/debootstrap.log" 2>&1 || {
        tail -n 20 "$work/debootstrap.log" >&2
        return 1
    }
    printf '%s\n' 'path-exclude /usr/share/doc/*' 'path-include /usr/share/doc/*/copyright' \
        'path-exclude /usr/share/man/*' 'path-exclude /usr/share/info/*' 'path-exclude /usr/share/locale/*' \
        >"$tree/etc/dpkg/dpkg.cfg.d/slim"
    debian_sources >"$tree/etc/apt/sources.list"
    rm -rf "$tree"/usr/share/man/* "$tree"/usr/share/info/* "$tree"/usr/share/locale/* \
        "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/* \
        "$tree"/var/log/*.log "$tree"/var/log/apt "$tree"/etc/resolv.conf "$tree"/etc/hostname
    find "$tree/usr/share/doc" -type f ! -name copyright -delete
    archive=$work/base.tar
    trees="$trees $archive"
    tar -C "$tree" --numeric-owner -cf "$archive" .
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$archive" / >/dev/null
    buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    # What was mended since that release.
    # shellcheck disable=SC2086 # options
    inside $apt_options >"$work/upgrade.log" 2>&1 <<'END' || {
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get upgrade -y -qq --no-install-recommends
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
END
        tail -n 20 "$work/upgrade.log" >&2
        return 1
    }
    buildah commit --quiet "$container" "localhost/ashlar-base:$suite" >/dev/null
    rm -rf "$tree" "$archive"
}
# With a number of what make_base does: another one, another base.
stamp=$work/base-2.stamp
if [ -z "$(find "$stamp" -mtime -$days_max 2>/dev/null)" ] || ! buildah inspect "localhost/ashlar-base:$suite" >/dev/null 2>&1; then
    rm -rf "$work/storage" "$work/run" "$stamp"
    make_base || skip "debootstrap could not make a base (see above)"
    : >"$stamp"
    ok "a base made with debootstrap"
else
    ok "the base of an earlier run"
fi

tidy_up

# --- both images ---
if [ "$mode" = compile ]; then
    make_builder() {
        from "localhost/ashlar-base:$suite"
        # shellcheck disable=SC2086 # options
        inside $apt_options <<'END'
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends gcc libc6-dev binutils ca-certificates >/dev/null
rm -rf /var/lib/apt/lists/*
END
        toolchain=$(rustc --print sysroot)
        mkdir -p "$tree/usr/local"
        for part in bin lib; do (cd "$toolchain" && tar -cf - $part) | tar -C "$tree/usr/local" -xf -; done
        buildah commit --quiet "$container" localhost/ashlar-builder >/dev/null
    }
    make_builder
    ok "a builder with $(rustc --version)"
    # What cargo downloaded on this machine needs no second download; what it downloads now stays here.
    cargo_home=${CARGO_HOME:-$HOME/.cargo}
    set -- --build-arg BUILDER=localhost/ashlar-builder --build-arg BINARIES=build
    # Whom this machine trusts, cargo in there trusts.
    [ ! -d /etc/ssl/certs ] || set -- "$@" --volume /etc/ssl/certs:/etc/ssl/certs:ro
    [ ! -d "$cargo_home/registry" ] || set -- "$@" --volume "$cargo_home/registry:/root/.cargo/registry:rw"
    context=.
else
    context=$work/context
    trees="$trees $context"
    rm -rf "$context"
    mkdir -p "$context/dist"
    for program in metadata-raft storage-daemon ashlar nbd-client csi-driver; do
        [ -x "$programs/$program" ] || fail "$programs/$program is not built"
        strip --strip-unneeded -p -o "$context/dist/$program" "$programs/$program"
    done
    # The builder is not used, but must not be asked of a registry either.
    set -- --build-arg "BUILDER=localhost/ashlar-base:$suite" --build-arg BINARIES=prebuilt
fi
for target in ashlar ashlar-node; do
    build "$@" --target $target --file Dockerfile --tag localhost/$target "$context" || fail "the Dockerfile's target $target does not build"
done
ok "both targets are built"

# --- what is in them ---
MIB=1048576
size_of() {
    # Of files, without what the programs of this repository take.
    du -sb --exclude="$1/usr/local/bin" "$1" | awk -v m=$MIB '{ printf "%d", $1 / m }'
}
files_of() {
    (cd "$1" && find . -xdev ! -path ./run ! -path './run/*' ! -path './proc/*' ! -path './sys/*' ! -path './dev/*' ! -type d | sort)
}
packages_of() {
    dpkg-query --admindir="$1/var/lib/dpkg" -W -f '${Package}\n' | sort
}
user_of() {
    buildah inspect --type image --format '{{.OCIv1.Config.User}}' "localhost/$1"
}
# Neither tools that build or download, nor what apt left behind. (Python comes with xfsprogs, which depends on it.)
nothing_needless() {
    for program in cc gcc c++ ld as make cargo rustc rustup git curl wget; do
        for path in bin usr/bin usr/local/bin; do
            [ ! -e "$1/$path/$program" ] || fail "$2 has $path/$program"
        done
    done
    [ -z "$(find "$1/var/lib/apt/lists" "$1/var/cache/apt/archives" -type f ! -name lock 2>/dev/null)" ] || fail "$2 keeps what apt downloaded"
    # Symbols belong to the build, not to what is shipped.
    for program in "$1"/usr/local/bin/*; do
        [ -z "$(readelf --section-headers "$program" | grep -F ' .symtab ' || true)" ] || fail "$2: $program has its symbols still"
    done
}
# The size in MiB of the programs in an image's tree.
programs_of() {
    size=$(du -sm "$1/usr/local/bin" | cut -f 1)
    [ "$size" -le $programs_max ] || fail "$2's programs have $size MiB, more than $programs_max"
    echo "$size"
}
# Of how this machine comes to packages nothing is left.
asks_debian() {
    debian_sources | cmp -s - "$1/etc/apt/sources.list" || fail "$2 has other sources of packages than Debian's"
    [ -z "$(ls "$1/etc/apt/sources.list.d")" ] || fail "$2 has sources of packages beside Debian's"
}
# The programs say what they are, and answer for help, as the image's user.
all_run() {
    for program in "$@"; do
        # shellcheck disable=SC2016 # for the shell in there
        printf '%s --version\n%s --help >/dev/null\n' "$program" "$program"
    done | inside || fail "a program does not run in the image"
}

from "localhost/ashlar-base:$suite"
base=$tree
base_size=$(size_of "$base")
files_of "$base" >"$work/base.files"
packages_of "$base" >"$work/base.packages"
[ "$base_size" -le $base_max ] || fail "the base has $base_size MiB, more than $base_max"
ok "the base: $base_size MiB"

from localhost/ashlar
# Before anything runs in it: buildah writes /etc/hosts and the like then.
added=$(files_of "$tree" | comm -13 "$work/base.files" - | tr '\n' ' ')
[ "$(user_of ashlar)" = 65532:65532 ] || fail "ashlar runs as $(user_of ashlar)"
[ "$(echo "id -u; id -g" | inside | tr '\n' :)" = 65532:65532: ] || fail "a process of ashlar is not 65532:65532"
ok "ashlar runs as 65532:65532"
all_run metadata-raft storage-daemon ashlar nbd-client
[ "$added" = "./usr/local/bin/ashlar ./usr/local/bin/metadata-raft ./usr/local/bin/nbd-client ./usr/local/bin/storage-daemon " ] || fail "ashlar has more than its programs: $added"
nothing_needless "$tree" ashlar
asks_debian "$tree" ashlar
size=$(programs_of "$tree" ashlar)
ok "ashlar adds to the base: 4 programs, $size MiB"
# As the pods use it: a disk in a directory that is somebody's, a node that starts, and the scripts' own tools.
inside <<'END' || fail "ashlar cannot format and inspect a disk as its user"
storage-daemon format /tmp/disk --size 256MiB >/dev/null
storage-daemon inspect /tmp/disk >/dev/null
rm /tmp/disk
END
ok "ashlar formats and inspects a disk as its user"

from localhost/ashlar-node
added=$(files_of "$tree" | comm -13 "$work/base.files" - | grep /usr/local/ | tr '\n' ' ')
all_run nbd-client csi-driver
[ "$added" = "./usr/local/bin/csi-driver ./usr/local/bin/nbd-client " ] || fail "ashlar-node has other programs: $added"
nothing_needless "$tree" ashlar-node
asks_debian "$tree" ashlar-node
size=$(programs_of "$tree" ashlar-node)
packages=$(packages_of "$tree" | comm -13 "$work/base.packages" - | tr '\n' ' ')
grown=$(($(size_of "$tree") - base_size))
[ "$grown" -le $packages_max ] || fail "ashlar-node's packages add $grown MiB, more than $packages_max: $packages"
ok "ashlar-node adds to the base: 2 programs, $size MiB, and packages, $grown MiB: $packages"

# Every program that these two start, by what their code says; the library calls of a program that is there must be found, too.
spawned=$(find nbd-client/src csi-driver/src -name '*.rs' ! -name '*tests.rs' -exec awk 'FNR == 1 { on = 1 } /^#\[cfg\(test\)\]/ { on = 0 } on' {} + |
    grep -oE '(Command::new\("|[ (]run\("|run_ok\("|"mkfs\.)[a-z0-9_.]+"' | sed -E 's/.*"(mkfs\.)?([^"]+)"$/\1\2/' | sort -u | tr '\n' ' ')
for known in mkfs.ext4 mkfs.xfs e2fsck blkid resize2fs xfs_growfs losetup umount modprobe nbdfuse; do
    case " $spawned" in *" $known "*) ;; *) fail "$known is no longer found in the code that starts it: see the pattern in $0" ;; esac
done
# nbdfuse asks fusermount3; blkid -p and mount by hand are what the documents tell people to do in the pod.
for program in $spawned fusermount3 mount; do
    echo "path=\$(command -v $program) || { echo 'there is no $program'; exit 1; }"
    # shellcheck disable=SC2016 # for the shell in there
    echo 'if ldd "$path" 2>&1 | grep "not found"; then exit 1; fi'
done | inside || fail "a program that nbd-client or csi-driver starts is missing"
inside <<'END' >/dev/null 2>&1 || fail "mkfs does not work in ashlar-node"
truncate -s 64M /tmp/ext4
truncate -s 400M /tmp/xfs
mkfs.ext4 -q /tmp/ext4 && blkid -p -o export /tmp/ext4 | grep -q TYPE=ext4 && e2fsck -p /tmp/ext4 && resize2fs /tmp/ext4 32M
mkfs.xfs -q /tmp/xfs && blkid -p -o export /tmp/xfs | grep -q TYPE=xfs
rm /tmp/ext4 /tmp/xfs
END
ok "ashlar-node has what its programs start: $spawned"

# The charts' scripts and probes run in these images: what they call must be there.
for image in ashlar ashlar-node; do
    case $image in
    ashlar) scripts="disks storage metadata hooks" ;;
    ashlar-node) scripts="nbd-client" ;;
    esac
    from localhost/$image
    for script in $scripts; do
        # Words in the place of a command, if this machine has such a program.
        sed -E 's/#.*//' "charts/ashlar/scripts/$script.sh" | grep -oE '(^ *|[|;&(`!] *|(if|then|do|while|until|else|exec) +)[a-z][a-z0-9_-]*' |
            grep -oE '[a-z0-9_-]+$' | sort -u | while read -r word; do
            path=$(env which "$word" 2>/dev/null) || continue
            case $path in /bin/* | /usr/bin/* | /sbin/* | /usr/sbin/*) echo "command -v $word >/dev/null || { echo 'there is no $word'; exit 1; }" ;; esac
        done
    done | inside || fail "a script of the chart calls a program that $image lacks"
done
ok "both images have what the chart's scripts call"

if [ "$mode" = compile ]; then
    for image in ashlar ashlar-node; do
        buildah push --quiet "localhost/$image" "oci-archive:$destination/$image.tar:$image" >/dev/null
        ok "$destination/$image.tar: $(du -m "$destination/$image.tar" | cut -f 1) MiB"
    done
fi
