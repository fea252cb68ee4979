//! The repository polices itself: what every source file must have and must not.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, lines.
const MAX_LINES: usize = 900;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Text files of the repository with one of these endings, by their path from its root.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    let (root, mut found) = (root(), Vec::new());
    let mut open = vec![root.clone()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                if name != "target" && name != ".git" {
                    open.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(&root).unwrap().display().to_string(), text));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// Fails with every fault at once.
fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn every_source_file_says_what_lives_there() {
    let headless = |text: &str| !text.trim_start().starts_with("//!");
    report(files(&[".rs"]).into_iter().filter(|(_, text)| headless(text)).map(|(path, _)| path).collect());
}

#[test]
fn no_file_is_too_long() {
    let long = files(&[".rs"]).into_iter().filter_map(|(path, text)| {
        let lines = text.lines().count();
        (lines > MAX_LINES).then(|| format!("{path} has {lines} lines"))
    });
    report(long.collect());
}

#[test]
fn nothing_is_left_undone() {
    // Put together here, so that this file has none of them.
    let words = ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!("));
    let mut faults = Vec::new();
    for (path, text) in files(&[".rs"]) {
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                faults.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    report(faults);
}

#[test]
fn rooms_without_unsafe_code_forbid_it() {
    let rooms = ["mirror/src/lib.rs", "cli/src/lib.rs", "cli/src/main.rs", "tests/src/lib.rs"];
    let lax = |path: &&&str| {
        let text = fs::read_to_string(root().join(path)).unwrap();
        !text.contains("#![forbid(unsafe_code)]")
    };
    report(rooms.iter().filter(lax).map(|path| format!("{path} does not forbid unsafe code")).collect());
}

#[test]
fn no_file_names_a_place_on_the_machine_it_was_written_on() {
    // Put together here, so that this file has none of them.
    let places = ["work", "root", "home"].map(|dir| format!("/{dir}/"));
    let mut faults = Vec::new();
    for (path, text) in files(&[".rs", ".md", ".toml", ".sh", ".json", "/run"]) {
        for (number, line) in text.lines().enumerate() {
            let starts_path = |at: usize| at == 0 || !line.as_bytes()[at - 1].is_ascii_alphanumeric();
            if places.iter().any(|place| line.match_indices(place.as_str()).any(|(at, _)| starts_path(at))) {
                faults.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    report(faults);
}
