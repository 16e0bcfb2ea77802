# Makes the pool, unless there is one of that name. Waits for the metadata cluster to answer.
set -u
until pools=$(ashlar --timeout 5 pool show "$POOL" 2>&1); do
    case $? in
    3)
        ashlar --timeout 10 pool create "$POOL" --replicas "$REPLICAS" --failure-domain "$FAILURE_DOMAIN" && exit 0
        ;;
    *) echo "$pools" ;;
    esac
    sleep 3
done
echo "$pools"
