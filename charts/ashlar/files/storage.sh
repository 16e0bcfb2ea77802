#!/bin/sh
# Makes the disks of a node ready and serves them.
#   ASHLAR_DISKS   paths or patterns of block devices, one per line
#   ASHLAR_FILES   files that are disks, "SIZE PATH" per line
#   ASHLAR_ZONE    zone of the node; may be empty
#   ASHLAR_READY_DIR  where storage-ready.sh keeps its marks
# The arguments are those of `storage-daemon serve`.
#
# A disk is formatted only if it is blank, and that `storage-daemon format` decides: never by force here. A disk
# with anything else on it is left alone and not served.
set -u

say() { echo "storage.sh: $*" >&2; }

# May this disk be served? Formats it if it is blank. Arguments: path, and options of format.
prepare() {
    path=$1
    shift
    if found=$(storage-daemon inspect "$path" 2>&1); then
        case $found in
        *"not an Ashlar disk"*) ;;
        *) return 0 ;;
        esac
    elif [ -e "$path" ]; then
        say "$path is not used: $found"
        return 1
    fi
    storage-daemon format "$path" "$@" && return 0
    say "$path is not used and was not changed: see the line above"
    return 1
}

rm -f "$ASHLAR_READY_DIR/ready"
date +%s >"$ASHLAR_READY_DIR/started"

[ -z "${ASHLAR_ZONE:-}" ] || set -- "$@" --label "topology.kubernetes.io/zone=$ASHLAR_ZONE"

ifs=$IFS
IFS='
'
disks=0
for path in ${ASHLAR_DISKS:-}; do
    # A pattern that matches nothing stays as it is.
    if [ ! -b "$path" ] && [ ! -f "$path" ]; then
        say "no disk $path here"
        continue
    fi
    if prepare "$path"; then
        set -- "$@" --disk "$path"
        disks=$((disks + 1))
    fi
done
for line in ${ASHLAR_FILES:-}; do
    size=${line%% *}
    path=${line#* }
    mkdir -p "${path%/*}"
    if prepare "$path" --size "$size"; then
        set -- "$@" --disk "$path"
        disks=$((disks + 1))
    fi
done
IFS=$ifs

[ "$disks" -gt 0 ] || say "no disk to serve yet; add one (values storage.groups, or: ashlar disk add)"
exec storage-daemon serve "$@"
