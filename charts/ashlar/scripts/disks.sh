#!/bin/sh
# Finds the disks of this node and formats the blank ones; writes their paths, one per line, to $LIST.
#
# Invariants:
# - Nothing is ever forced: what `storage-daemon format` takes for foreign data, or for in use, is left alone.
# - A disk that this node served before stays on the list whatever it looks like now, so that the daemon says
#   what is wrong with it.
#
# Environment: DISKS and EXCLUDE (globs, separated by white space), DATA_DIR, LIST.
set -u
set -f

: "${DISKS=}" "${EXCLUDE=}" "${DATA_DIR:?}" "${LIST:?}"
: "${TERMINATION_LOG:=/dev/termination-log}"
left_alone=0

# Paths that a list of globs names, as they really are.
expand() {
    for glob in $1; do
        set +f
        for path in $glob; do
            set -f
            # A glob that matches nothing stands for itself.
            if [ -e "$path" ]; then
                readlink -f "$path"
            else
                case $glob in
                *[*?[]*) ;;
                *) printf '%s\n' "$path" ;;
                esac
            fi
        done
        set -f
    done
}

known() {
    [ -f "$DATA_DIR/node.json" ] && grep -qF "\"path\": \"$1\"" "$DATA_DIR/node.json"
}

leave() {
    echo "LEFT ALONE: $1" | tee -a "$TERMINATION_LOG" >&2
    left_alone=$((left_alone + 1))
}

excluded=$(expand "$EXCLUDE")
new=$LIST.new
: >"$new"

for disk in $(expand "$DISKS" | sort -u); do
    if printf '%s\n' "$excluded" | grep -qxF "$disk"; then
        echo "excluded: $disk"
        continue
    fi
    if known "$disk"; then
        echo "known: $disk"
        printf '%s\n' "$disk" >>"$new"
        continue
    fi
    if [ ! -e "$disk" ]; then
        leave "$disk: there is no such disk on this node"
        continue
    fi
    if said=$(storage-daemon format "$disk" 2>&1); then
        echo "$said"
        printf '%s\n' "$disk" >>"$new"
        continue
    fi
    case $said in
    *"is the Ashlar disk"*)
        echo "formatted before: $disk"
        printf '%s\n' "$disk" >>"$new"
        ;;
    *) leave "$said" ;;
    esac
done

mv "$new" "$LIST"
echo "disks: $(wc -l <"$LIST"), left alone: $left_alone"
