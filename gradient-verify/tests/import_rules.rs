//! Who may import whom: held against the manifests of all five crates and against this crate's sources.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Each crate and those of ours that it may import.
const RULES: [(&str, &[&str]); 5] = [
    ("datasets", &[]),
    ("coordinatorless", &[]),
    ("trainer", &["datasets"]),
    ("gradient-verify", &["trainer", "datasets", "coordinatorless"]),
    ("launch", &["trainer", "datasets", "coordinatorless", "gradient-verify"]),
];

/// Those of our crates that a manifest names in any table of dependencies, under whatever alias.
fn imports(manifest: &str) -> Vec<&'static str> {
    let names = RULES.map(|(name, _)| name);
    let mut found = Vec::new();
    let mut in_dependencies = false;
    for line in manifest.lines().map(|line| line.split('#').next().unwrap().trim()) {
        if let Some(table) = line.strip_prefix('[') {
            in_dependencies = table.contains("dependencies");
            // `[dependencies.trainer]`
            let last = table.trim_end_matches(']').rsplit('.').next().unwrap();
            found.extend(names.iter().filter(|name| in_dependencies && **name == last));
        } else if in_dependencies {
            let key = line.split(['.', '=', ' ']).next().unwrap().trim_matches('"');
            let named = |name: &str| key == name || line.contains(&format!("package = \"{name}\""));
            found.extend(names.iter().filter(|name| named(name)));
        }
    }
    found
}

/// The first segment of every path into `coordinatorless` in a source, those of grouped imports included; `*` for a glob.
fn segments(source: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, crate_name) in source.match_indices("coordinatorless") {
        let Some(path) = source[at + crate_name.len()..].strip_prefix("::") else {
            continue;
        };
        match path.strip_prefix('{') {
            // Inner groups are split too: more segments than there are, never fewer.
            Some(group) => {
                let end = group.find(';').unwrap_or(group.len());
                found.extend(group[..end].split([',', '{', '}']).map(first));
            }
            None => found.push(first(path)),
        }
    }
    found.retain(|segment| !segment.is_empty());
    found
}

/// The identifier, or the star, that a path begins with.
fn first(path: &str) -> &str {
    let path = path.trim();
    let end = path
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(path.len());
    if path.starts_with('*') { "*" } else { &path[..end] }
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn every_crate_imports_only_what_it_may() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (name, allowed) in RULES {
        let manifest = fs::read_to_string(root.join(name).join("Cargo.toml")).unwrap();
        for import in imports(&manifest) {
            assert!(allowed.contains(&import), "{name} imports {import}");
        }
    }
}

#[test]
fn a_forbidden_import_is_found_however_it_is_written() {
    for manifest in [
        "[dependencies]\ntrainer.workspace = true",
        "[dependencies]\ntrainer = { path = \"../trainer\" }",
        "[dev-dependencies.trainer]\nworkspace = true",
        "[target.'cfg(unix)'.build-dependencies]\n\"trainer\" = \"1\"",
        "[dependencies]\nother = { package = \"trainer\", path = \"../trainer\" }",
    ] {
        assert_eq!(imports(manifest), ["trainer"], "{manifest}");
    }
    assert!(imports("[package]\nname = \"trainer\"\n[dependencies]\n# trainer\nserde = \"1\"").is_empty());
}

#[test]
fn the_audit_never_touches_the_network() {
    let files = rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let mut seen = 0;
    for file in files {
        let source = fs::read_to_string(&file).unwrap();
        for segment in segments(&source) {
            seen += 1;
            assert!(
                !["net", "node", "self", "*"].contains(&segment),
                "{}: coordinatorless::{segment}",
                file.display()
            );
        }
        assert!(
            !source.contains("coordinatorless as "),
            "{}: an alias hides what is imported",
            file.display()
        );
    }
    assert!(seen > 0, "the sources were not found");
}

#[test]
fn a_path_into_the_network_is_found_however_it_is_written() {
    let paths = ["net::blobs", "{types, net}", "{types::{Hash}, net::Endpoint}", "*"];
    let found = paths.map(|path| {
        let source = format!("use coordinatorless::{path};");
        let found = segments(&source);
        found.contains(&"net") || found.contains(&"*")
    });
    assert_eq!(found, [true; 4]);
    assert_eq!(
        segments("use coordinatorless::{types::Hash, config};"),
        ["types", "config"]
    );
    assert_eq!(segments("use coordinatorless::types::Hash;"), ["types"]);
}
