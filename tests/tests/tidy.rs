//! The repository's own rules for its Rust files (CONTRIBUTING.md) that no lint checks.
//!
//! Every file opens with a `//!` header. One of more than 600 lines says in its header why, in a line that begins
//! with "Longer than 600 lines:"; those that do neither yet are in a list that can only become shorter.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

const LINES_MAX: usize = 600;
/// Opens the line of a header that argues for more, and is followed by the reason.
const ARGUED: &str = "//! Longer than 600 lines: ";

/// Longer than that without a reason, and how long they may be. Nothing is added here, and no number grows: who makes
/// one shorter lowers it, who mends one takes it out.
const NOT_YET_MENDED: [(&str, usize); 2] = [
    ("nbd-client/src/engine/tests/scenarios.rs", 626),
    ("platform/src/sim/disk.rs", 790),
];

/// Directories that hold no source of this repository.
const SKIPPED: [&str; 2] = ["target", ".git"];

struct Source {
    /// From the root of the repository, with `/`.
    name: String,
    text: String,
}

impl Source {
    /// The lines of the `//!` header.
    fn header(&self) -> impl Iterator<Item = &str> {
        self.text.lines().take_while(|line| line.starts_with("//!"))
    }

    /// Code without comments and without what stands in (one-line) strings, with the lines' numbers.
    fn code(&self) -> impl Iterator<Item = (usize, String)> {
        let numbered = self.text.lines().enumerate();
        numbered.map(|(index, line)| (index + 1, without_strings(line)))
    }
}

/// A line up to its comment; strings are emptied.
fn without_strings(line: &str) -> String {
    let mut out = String::new();
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => drop(chars.next()),
            // The character '"', which opens nothing.
            '\'' if !quoted && chars.peek() == Some(&'"') => drop(chars.next()),
            '"' => quoted = !quoted,
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            _ if quoted => {}
            c => out.push(c),
        }
    }
    out
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn collect(directory: &Path, root: &Path, sources: &mut Vec<Source>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type().unwrap().is_dir() {
            // Hidden ones and `target-*`, too, as in .gitignore.
            let skipped = SKIPPED.iter().any(|s| name == *s) || name.starts_with('.');
            if !skipped && !name.starts_with("target-") {
                collect(&path, root, sources);
            }
        } else if name.ends_with(".rs") {
            let relative = path.strip_prefix(root).unwrap();
            sources.push(Source {
                name: relative.to_string_lossy().into_owned(),
                text: std::fs::read_to_string(&path).unwrap(),
            });
        }
    }
}

fn sources() -> Vec<Source> {
    let (root, mut sources) = (root(), Vec::new());
    collect(&root, &root, &mut sources);
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    // Else everything below would pass.
    assert!(sources.len() > 100, "only {} files found", sources.len());
    sources
}

fn assert_none(broken: Vec<String>) {
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = sources()
        .into_iter()
        .filter(|s| s.header().next().is_none());
    assert_none(
        silent
            .map(|s| format!("{}: has no `//!` header", s.name))
            .collect(),
    );
}

/// What is wrong with a file's length.
fn length_problem(source: &Source) -> Option<String> {
    let lines = source.text.lines().count();
    let argued = source.header().any(|line| {
        line.strip_prefix(ARGUED)
            .is_some_and(|reason| !reason.trim().is_empty())
    });
    let allowed = NOT_YET_MENDED
        .iter()
        .find(|(name, _)| *name == source.name)
        .map(|(_, lines)| *lines);
    match allowed {
        None if lines > LINES_MAX && !argued => Some(format!(
            "{}: {lines} lines, more than {LINES_MAX}; split it, or say why in its header ({ARGUED}…)",
            source.name
        )),
        Some(_) if lines <= LINES_MAX || argued => Some(format!(
            "{}: mended; take it out of NOT_YET_MENDED",
            source.name
        )),
        Some(allowed) if lines > allowed => Some(format!(
            "{}: {lines} lines, and it had {allowed}: it only becomes shorter",
            source.name
        )),
        _ => None,
    }
}

#[test]
fn long_files_say_why() {
    let sources = sources();
    let mut broken: Vec<String> = sources.iter().filter_map(length_problem).collect();
    for (name, _) in NOT_YET_MENDED {
        if !sources.iter().any(|s| s.name == name) {
            broken.push(format!("{name}: gone; take it out of NOT_YET_MENDED"));
        }
    }
    assert_none(broken);
}

#[test]
fn nothing_is_left_to_do_and_no_lint_is_silenced() {
    // In two parts, so that this file passes.
    let forbidden = [
        (concat!("todo", "!"), "write it, or an error"),
        (concat!("unimplemented", "!"), "write it, or an error"),
        (concat!("#[", "allow("), "use #[expect(…, reason = \"…\")]"),
        (
            concat!("#![", "allow("),
            "use #![expect(…, reason = \"…\")]",
        ),
        // In a cfg_attr.
        (concat!(", ", "allow("), "use expect(…, reason = \"…\")"),
    ];
    let mut broken = Vec::new();
    for source in sources() {
        for (number, line) in source.code() {
            for (text, instead) in forbidden {
                if line.contains(text) {
                    broken.push(format!("{}:{number}: {text} ({instead})", source.name));
                }
            }
        }
    }
    assert_none(broken);
}

#[test]
fn comments_and_strings_are_not_code() {
    let code = |line| without_strings(line);
    assert_eq!(code("let a = b; // todo"), "let a = b; ");
    assert_eq!(code(r#"say("no // comment", x)"#), "say(, x)");
    assert_eq!(code(r#"say("a \" b", x) // c"#), "say(, x) ");
    assert_eq!(code(r#"'"' => x, // c"#), "' => x, ");
}

#[test]
fn a_long_file_needs_the_reason_in_its_header() {
    let source = |name: &str, header: &str| Source {
        name: name.to_owned(),
        text: format!("{header}\n{}", "x\n".repeat(LINES_MAX)),
    };
    assert!(length_problem(&source("a.rs", "//! Short.")).is_some());
    assert!(
        length_problem(&source(
            "a.rs",
            "//! A table.\n//! Longer than 600 lines: one table is one table."
        ))
        .is_none()
    );
    for none in ["//! Of many lines.", "// Longer than 600 lines: x", ARGUED] {
        assert!(length_problem(&source("a.rs", none)).is_some(), "{none}");
    }
    let (name, allowed) = NOT_YET_MENDED[0];
    assert!(length_problem(&source(name, "//! Short.")).is_none());
    let grown = format!("//! Short.\n{}", "x\n".repeat(allowed));
    assert!(length_problem(&source(name, &grown)).is_some());
    let argued = format!("{ARGUED}one table.");
    assert!(length_problem(&source(name, &argued)).is_some());
}
