# An upgrade restarts a storage daemon after the other. With a replica missing already, the next one could be the last.
set -u
hint="(to upgrade all the same: helm upgrade --no-hooks, or --set upgradeCheck.enabled=false)"
if ! status=$(ashlar --timeout 20 -o json cluster status); then
    echo "refused: the metadata cluster does not answer $hint" >&2
    exit 1
fi
case $(echo "$status" | tr -d ' \n') in
*'"volumes_degraded":0,"volumes_waiting":0,'*) exit 0 ;;
esac
ashlar cluster status >&2
ashlar volume list >&2
echo "refused: a volume lacks a replica; wait for its rebuild (ashlar replica list) $hint" >&2
exit 1
