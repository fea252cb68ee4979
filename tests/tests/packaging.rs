//! What a package is made of: the systemd unit, man pages, completions, and the list of what goes where.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

#[test]
fn systemd_takes_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(root().join("packaging/vmove.service")).unwrap();
    let unit = unit.replace("/usr/bin/vmove ", &format!("{PROGRAM} "));
    assert!(unit.contains(PROGRAM));
    let verify = |text: &str| {
        let path = dir.path().join("vmove.service");
        fs::write(&path, text).unwrap();
        succeeds(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(path))
    };
    // Mistakes it can live with it only tells of.
    let ours = |said: String| {
        said.lines().filter(|line| line.contains("vmove")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ours(verify(&unit)), Vec::<String>::new());
    assert_ne!(ours(verify(&unit.replace("KillMode", "KilMode"))), Vec::<String>::new(), "it looks");
}

#[test]
fn all_that_the_package_lists_is_there() {
    let dir = tempfile::tempdir().unwrap();
    succeeds(Command::new(PROGRAM).arg("generate").arg(dir.path()));
    let man = |page: &str| fs::read_to_string(dir.path().join("man").join(page)).unwrap();
    assert!(man("vmove.1").contains("130 cancelled"));
    assert!(man("vmove-move.1").contains("dry\\-run"));
    assert!(man("vmove-datastore-add.1").contains("DIR"));
    assert!(!dir.path().join("man/vmove-vm-process.1").exists(), "hidden");
    let completions = dir.path().join("completions");
    succeeds(Command::new("bash").arg("-n").arg(completions.join("vmove.bash")));

    let manifest = fs::read_to_string(root().join("cli/Cargo.toml")).unwrap();
    let manifest: toml::Table = toml::from_str(&manifest).unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    let assets = deb["assets"].as_array().unwrap();
    assert!(assets.len() > 4);
    for asset in assets {
        let from = asset[0].as_str().unwrap();
        let path = match from.strip_prefix("../target/packaging/") {
            Some(made) => dir.path().join(made),
            None if from.starts_with("target/release/") => continue,
            None => root().join("cli").join(from),
        };
        let there =
            match path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('*')) {
                Some(ending) => fs::read_dir(path.parent().unwrap())
                    .unwrap()
                    .any(|file| file.unwrap().file_name().to_str().unwrap().ends_with(ending)),
                None => path.exists(),
            };
        assert!(there, "{from} is not there");
    }
    let units = deb["systemd-units"]["unit-scripts"].as_str().unwrap();
    assert!(root().join("cli").join(units).join("vmove.service").exists());
}
