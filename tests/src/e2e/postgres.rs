//! PostgreSQL in user-mode Linux nodes: scripts that make it, start it, fill a ledger and check what is there.
//!
//! The ledger's rows are numbered without a hole. What was reported as committed is written to the node's share, outside of
//! any volume, so that it outlives the node.

use std::path::Path;

use super::have;
use super::uml::{HOST_ADDRESS, PROGRAMS};

const PG: &str = "/usr/lib/postgresql/15/bin";
const AS: &str = "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n";

/// Starts the database in /pg/data.
pub const START: &str = "as PG/pg_ctl -D /pg/data -w -t 60 -l /pg/log -o '-c unix_socket_directories=/run/postgresql \
    -c listen_addresses= -c shared_buffers=64MB' start\n";

/// Adds to the ledger for ever.
pub const COMMITS: &str = "n=0; while true; do n=$((n+1)); as PG/psql -h /run/postgresql -qc \"insert into ledger values ($n)\" bench \
    && echo $n > /share/committed.tmp && mv /share/committed.tmp /share/committed; done\n";

/// Prints what [`check`] reads.
pub const CHECK: &str = "echo highest $(as PG/psql -h /run/postgresql -Atc 'select count(*), max(n) from ledger' bench)\n\
    echo balance $(as PG/psql -h /run/postgresql -Atc 'select sum(abalance) = (select sum(delta) from pgbench_history) \
    from pgbench_accounts' bench)\n\
    as PG/pg_amcheck -h /run/postgresql --install-missing --heapallindexed bench || echo AMCHECK_FAILED\n";

/// Whether this machine has what such a test needs; else it says so.
pub fn is_there() -> bool {
    let mut programs = PROGRAMS.to_vec();
    let (initdb, pgbench) = (format!("{PG}/initdb"), format!("{PG}/pgbench"));
    programs.extend(["/usr/sbin/nbd-client", "mkfs.ext4", &initdb, &pgbench]);
    have(&programs)
}

/// A script of these parts, in which `as` runs a program as the database's user and `PG/` is where its programs are.
pub fn script(parts: &[&str]) -> String {
    let text = parts.concat();
    format!("{AS}{text}").replace("PG/", &format!("{PG}/"))
}

/// Attaches exports, by name and port, as /dev/nbd0 and so on with the stock tool; from here on an error ends the script.
pub fn attach(exports: &[(&str, u16)]) -> String {
    let mut script = "set -e\n\
        insmod $(find /lib/modules/$(uname -r)/ -name nbd.ko) max_part=0 2>/dev/null || modprobe nbd max_part=0\n\
        mkdir -p /pg /run/postgresql\nchown postgres /run/postgresql\n"
        .to_owned();
    for (device, (name, port)) in exports.iter().enumerate() {
        script.push_str(&format!(
            "/usr/sbin/nbd-client -N {name} {HOST_ADDRESS} {port} /dev/nbd{device} -b 4096 -connections 2 -persist -timeout 30\n"
        ));
    }
    script
}

/// Makes the tables of pgbench, of this scale, and the ledger.
pub fn fill(scale: u32) -> String {
    format!(
        "as PG/createdb -h /run/postgresql bench\n\
         as PG/pgbench -h /run/postgresql -i -s {scale} -q bench\n\
         as PG/psql -h /run/postgresql -q bench -c 'create table ledger (n bigint primary key)'\n"
    )
}

/// What a node with this share has reported as committed.
pub fn committed(share: &Path) -> u64 {
    let text = std::fs::read_to_string(share.join("committed")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The highest number in the ledger, from the output of [`CHECK`].
///
/// # Panics
/// If there is a hole, pgbench's balance is wrong, or an index or table is damaged.
pub fn check(output: &str) -> u64 {
    let line = |name: &str| output.lines().find_map(|l| l.trim().strip_prefix(name));
    let highest = line("highest ").and_then(|l| l.split_once('|'));
    let (count, max) = highest.unwrap_or_else(|| panic!("{output}"));
    assert_eq!(count, max, "no hole in the ledger: {output}");
    assert_eq!(line("balance "), Some("t"), "pgbench's balance: {output}");
    assert!(!output.contains("AMCHECK_FAILED"), "{output}");
    max.trim().parse().unwrap_or_else(|_| panic!("{output}"))
}
