//! Finding and running programs.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A binary of this workspace, beside the test's own (target/PROFILE), or in ASHLAR_BIN_DIR.
///
/// # Panics
/// If it was not built: `cargo build --workspace --bins` comes before the tests.
pub fn binary(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("ASHLAR_BIN_DIR") {
        return PathBuf::from(dir).join(name);
    }
    let exe = std::env::current_exe().expect("the test has a path");
    let dir = exe
        .parent()
        .and_then(|deps| deps.parent())
        .expect("target/PROFILE/deps/test");
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace --bins` first (make test does)",
        path.display()
    );
    path
}

/// The path of a program that `.ci/install-go-tools.sh` installs, whether or not it is there.
///
/// # Panics
/// If the test has no path.
pub fn go_tool(name: &str) -> String {
    let directory = std::env::var_os("ASHLAR_GO_TOOLS").map(PathBuf::from);
    let beside = || {
        let exe = std::env::current_exe().expect("the test has a path");
        let target = exe.ancestors().nth(3).expect("target/PROFILE/deps/test");
        target.join("go-tools")
    };
    let path = directory.unwrap_or_else(beside).join(name);
    path.to_string_lossy().into_owned()
}

/// Whether all these programs are installed. If not, says so loudly; under CI=true that is a failure.
///
/// # Panics
/// Under CI=true, if one is missing.
pub fn have(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|p| which(p).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("SKIPPED {test}: not installed: {missing:?} (see .ci/install-tools.sh)");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{line}");
    // Past the test harness's capture, so that it is seen.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
    if let Some(path) = std::env::var_os("ASHLAR_SKIPPED_LOG")
        && let Ok(mut file) = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path)
    {
        let _ = writeln!(file, "{line}");
    }
    false
}

fn which(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return std::path::Path::new(program)
            .exists()
            .then(|| program.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|p| p.exists())
}

/// Runs a program to its end.
///
/// # Panics
/// If it cannot be started.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} cannot be started: {e}"))
}

/// Runs a program that must succeed; returns its standard output.
///
/// # Panics
/// If it fails; its output is in the message.
pub fn run_ok<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let output = run(program, args);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {:?} failed ({}):\n{stdout}\n{}",
        args.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

/// Waits until `condition` yields a value.
///
/// # Panics
/// After `limit`.
pub fn wait_until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
