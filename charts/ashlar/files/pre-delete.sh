# Uninstalling does not delete data, but volumes that are in use would hang, and nobody could delete them any more.
set -u
hint="(to uninstall all the same: helm uninstall --no-hooks)"
if ! status=$(ashlar --timeout 20 -o json cluster status); then
    echo "refused: the metadata cluster does not answer $hint" >&2
    exit 1
fi
case $(echo "$status" | tr -d ' \n') in
*'"volumes":0,'*) exit 0 ;;
esac
ashlar volume list >&2
echo "refused: there are volumes; delete their claims first $hint" >&2
exit 1
