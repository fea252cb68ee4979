//! From bare machines to an emptied one, as a newcomer types it: the very lines of the README. And what a newcomer may get wrong: clear
//! words, nothing half done.

use std::path::Path;

use vmove_tests::kvm;
use vmove_tests::machine::Machine;
use vmove_tests::netns::{CLIENT, Lan};
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
/// Stands before the lines in the README.
const MARK: &str = "<!-- typed as it is by tests/tests/setup.rs -->\n\n```\n";
/// What stands there for the words that `init` has printed.
const INVITATION: &str = "192.0.2.1:7070 --token vmove1-...";

/// The lines of the README and the machine each is typed on.
fn readme() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, block) = text.split_once(MARK).expect("the README has the mark");
    let (block, _) = block.split_once("```").unwrap();
    let mut machine = String::new();
    let mut lines = Vec::new();
    for line in block.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("# on ") {
            Some(place) => place.split([',', ' ']).next().unwrap().clone_into(&mut machine),
            None => lines.push((machine.clone(), line.to_owned())),
        }
    }
    lines
}

/// What is left of a machine's own files, apart from logs.
fn traces(machine: &Machine) -> Vec<String> {
    ["etc", "srv", "var/lib", "run"].iter().flat_map(|below| machine.files(below)).collect()
}

#[test]
fn the_readme_is_typed_on_bare_machines_and_mistakes_do_no_harm() {
    const TEST: &str = "the_readme_is_typed_on_bare_machines_and_mistakes_do_no_harm";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(lan) = Lan::new(TEST, 3) else { return };
    let dir = tempfile::Builder::new().prefix("vms-").tempdir().unwrap();
    let mut machines = Vec::new();
    for (index, name) in ["left", "right", "third"].into_iter().enumerate() {
        lan.host(index).ip(&format!("route add default via {CLIENT}")).unwrap();
        match Machine::boot(lan.host(index), name, &dir.path().join(name), Path::new(PROGRAM)) {
            Ok(machine) => machines.push(machine),
            Err(why) => return kvm::skipped(TEST, &format!("machines of their own cannot be made: {why}")),
        }
    }
    let [left, right, third] = &mut machines[..] else { unreachable!("three were made") };
    std::fs::write(left.dir.join("root/vmlinux"), vmove_guest_image::GUEST_ELF).unwrap();

    let mut invitation = String::new();
    for (place, line) in readme() {
        let machine = if place == "right" { &mut *right } else { &mut *left };
        let answer = machine.types(&line.replace(INVITATION, &invitation));
        eprintln!("{place}$ {line}\n{}", answer.stdout);
        let said = answer.ok();
        if line.starts_with("vmove init") {
            let words = said.lines().find_map(|line| line.trim().strip_prefix("vmove join ")).unwrap();
            words.clone_into(&mut invitation);
        }
    }
    until("the VM going on", || {
        left.types("vmove show web").stdout.contains("web is running on left").then_some(())
    });
    let hosts = left.types("vmove host ls").ok();
    for word in
        ["left", "right", "10.77.0.10:7070", "10.77.0.11:7070", "reachable", env!("CARGO_PKG_VERSION")]
    {
        assert!(hosts.contains(word), "{word} is not in\n{hosts}");
    }

    definitions(left, right);
    who_may_not_join(left, third, &invitation);
    datastores_that_cannot_be(left);
    configurations_with_mistakes(third);
    contexts(left);
}

/// A VM out of a file, with an image and a seed for cloud-init: made, moved, edited, renamed, cloned.
fn definitions(left: &mut Machine, right: &mut Machine) {
    left.types(
        "printf '#cloud-config\\n' >user-data; head -c 3M /dev/urandom >disk.img; truncate -s 16M disk.img",
    )
    .ok();
    let toml = "name = \"web01\"\nmemory = \"64MiB\"\nkernel = \"vmlinux\"\ncmdline = \"vmove.cpus=1\"\napart = [\"web\"]\n\n\
                [[disks]]\nname = \"vda\"\nimage = \"disk.img\"\nsize = \"64MiB\"\n\n\
                [cloud_init]\nuser_data = \"user-data\"\n";
    std::fs::write(left.dir.join("root/web01.toml"), toml).unwrap();
    let before = left.files("srv");
    let mistakes: [(&str, &str, &[&str]); 5] = [
        ("64MiB\"\nkernel", "64 GigaByte\"\nkernel", &["web01.toml", "line 2, column 10"]),
        ("apart", "aparty", &["line 5, column 1", "unknown field `aparty`"]),
        ("disk.img", "none.img", &["none.img", "No such file"]),
        ("size = \"64MiB\"", "size = \"1MiB\"", &["vda", "16777216"]),
        ("size = \"64MiB\"", "datastore = \"attic\"", &["no datastore \"attic\"", "fast"]),
    ];
    for (good, bad, said) in mistakes {
        let wrong = toml.replace(good, bad);
        assert_ne!(wrong, toml);
        std::fs::write(left.dir.join("root/web01.toml"), wrong).unwrap();
        left.types("vmove create -f web01.toml").refused(1, said);
    }
    assert_eq!(left.files("srv"), before);
    std::fs::write(left.dir.join("root/web01.toml"), toml).unwrap();
    left.types("vmove create -f web01.toml").ok();
    left.types("cmp -n 16777216 disk.img <(qemu-img convert -f qcow2 -O raw /srv/fast/web01/vda.qcow2 all.img; cat all.img)").ok();
    assert_eq!(left.types("blkid -p -o value -s LABEL /srv/fast/web01/cidata.raw").ok(), "CIDATA\n");
    left.types("vmove start web01 && vmove web01 --host right").ok();
    left.types("EDITOR=true vmove rename web01 other").refused(1, &["vmove stop web01"]);
    left.types("vmove stop --now web01").ok();
    let edit = |left: &mut Machine, script: &str| {
        left.types(&format!("EDITOR=\"sed -i '{script}'\" vmove edit web01"))
    };
    edit(left, "s/^vcpus/cpus/")
        .refused(1, &["line 3, column 1", "unknown field `cpus`", "what was typed is in"]);
    edit(left, "s/64MiB/1GiB/").refused(1, &["cannot be changed so", "size and format of disk vda"]);
    assert_eq!(edit(left, "s/x/x/").ok(), "nothing changed\n");
    edit(left, "s/^memory.*/memory = 134217728/").ok();
    let shown = left.types("vmove show web01 --toml").ok();
    assert!(shown.contains("memory = \"128MiB\"\n") && shown.contains("apart = [\"web\"]"), "{shown}");
    left.types("vmove rename web01 web").refused(1, &["has a VM \"web\" already"]);
    left.types("vmove rename web01 web02 && vmove clone web02 web03").ok();
    left.types("vmove show web01").refused(1, &["no VM"]);
    // Both start, each from disks of its own, and can be moved as any other.
    left.types("vmove start web02 && vmove start web03 && vmove web02 --host left").ok();
    left.types("vmove stop --now web02 && vmove stop --now web03 && vmove rm web02 && vmove rm web03").ok();
    left.types("vmove create web04 --from disk.img --kernel vmlinux --user-data user-data && vmove rm web04")
        .ok();
    assert_eq!(left.files("srv"), before);
    assert!(!right.files("srv").iter().any(|file| file.contains("web0")), "{:?}", right.files("srv"));
}

/// Tokens that were used or are too old, another cluster's, a name that is taken: refused, and nothing is left at the machine.
fn who_may_not_join(left: &mut Machine, third: &mut Machine, used: &str) {
    let join = |third: &mut Machine, words: &str, said: &[&str]| {
        let before = traces(third);
        third.types(&format!("vmove join {words} --datastore fast=/srv/fast")).refused(1, said);
        assert_eq!(traces(third), before);
    };
    let invited = |left: &mut Machine| {
        let said = left.types("vmove token").ok();
        said.lines().find_map(|line| line.trim().strip_prefix("vmove join ")).unwrap().to_owned()
    };
    join(third, used, &["not valid", "used before", "vmove token"]);
    let old = invited(left);
    let tokens = left.dir.join("var/lib/vmove/tokens.json");
    let text = std::fs::read_to_string(&tokens).unwrap();
    let mut stored: serde_json::Value = serde_json::from_str(&text).unwrap();
    for token in stored.as_array_mut().unwrap() {
        token["expires"] = 1_000_000_000.into();
    }
    std::fs::write(&tokens, stored.to_string()).unwrap();
    join(third, &old, &["not valid", "expired"]);

    let good = invited(left);
    join(third, &format!("{good} --name right"), &["has a host \"right\" already", "--name"]);
    join(third, &format!("{good} --name third_"), &["no host name"]);
    // A token names its cluster: this one is of another that listens nowhere.
    let other = third.types("vmove init --state ./other --listen 10.77.0.12:7071").ok();
    let token = other.lines().find_map(|line| line.trim().split_once(" --token ")).unwrap().1.to_owned();
    let (address, _) = good.split_once(' ').unwrap();
    join(third, &format!("{address} --token {token}"), &["did not prove to be of the cluster"]);
    join(third, &good.replace(":7070", ":1"), &["cannot reach", "vmove agent"]);
    // None of these used the token up.
    third.types(&format!("vmove join {good} --datastore fast=/srv/fast")).ok();
    third.types("systemctl enable --now vmove").ok();
    third.types(&format!("vmove join {good}")).refused(1, &["identity of a host already"]);
    until("third being reachable", || {
        let hosts = left.types("vmove host ls --json").ok();
        let hosts: Vec<vmove::api::types::KnownHost> = serde_json::from_str(&hosts).unwrap();
        hosts.iter().any(|host| host.name == "third" && host.reachable).then_some(())
    });
}

/// Directories that are missing, read-only, full, or taken.
fn datastores_that_cannot_be(left: &mut Machine) {
    left.types("mkdir /srv/ro /srv/full && mount -t tmpfs -o ro none /srv/ro").ok();
    left.types(
        "mount -t tmpfs -o size=1m none /srv/full; head -c 2m /dev/zero >/srv/full/x 2>/dev/null; true",
    )
    .ok();
    let config = std::fs::read_to_string(left.dir.join("etc/vmove/agent.toml")).unwrap();
    let stores = left.types("vmove datastore ls").ok();
    for (words, said) in [
        ("x /srv/none", "No such file"),
        ("x /srv/ro", "Read-only"),
        ("x /srv/full", "No space left"),
        ("x /etc/vmove/agent.toml", "Not a directory"),
        ("x /srv/fast", "is datastore \"fast\" already"),
        ("fast /srv/ro", "has a datastore \"fast\" already"),
        ("../x /srv/fast", "must not begin"),
    ] {
        left.types(&format!("vmove datastore add {words}")).refused(1, &[said]);
    }
    left.types("vmove datastore rm none").refused(1, &["no datastore \"none\"", "fast"]);
    assert_eq!(std::fs::read_to_string(left.dir.join("etc/vmove/agent.toml")).unwrap(), config);
    assert_eq!(left.types("vmove datastore ls").ok(), stores);
    assert_eq!(left.types("ls -A /srv/full").ok(), "x\n");
    // A good one comes and goes without a restart.
    left.types("mkdir /srv/more && vmove datastore add more /srv/more --default").ok();
    assert!(left.types("vmove datastore ls").ok().contains("/srv/more"));
    left.types("vmove datastore rm more").ok();
    assert_eq!(left.types("vmove datastore ls").ok(), stores);
}

/// Mistakes in `agent.toml` are shown by line and column before anything is done.
fn configurations_with_mistakes(third: &mut Machine) {
    third.types("mkdir wrong; printf 'name = \"x\"\\nlisten = \"10.77.0.12:7075\"\\n\\ncolour = 1\\n' >wrong/agent.toml").ok();
    third.types("vmove agent --state wrong").refused(1, &["wrong/agent.toml", "line 4, column 1", "colour"]);
    third.types("sed -i 's/colour = 1/cpu_mask = 5/' wrong/agent.toml").ok();
    third.types("vmove agent --state wrong").refused(1, &["wrong/agent.toml", "line 4, column 12"]);
    assert_eq!(third.types("ls wrong").ok(), "agent.toml\n");
}

/// Commands reach a cluster by its context, here through an `ssh` that stays where it is.
fn contexts(left: &mut Machine) {
    left.types("printf '#!/bin/sh\\nwhile [ \"$1\" != -- ]; do shift; done\\nshift 2\\nexec \"$@\"\\n' >../bin/ssh; chmod +x ../bin/ssh").ok();
    left.types("vmove context add far ssh://root@far && vmove context use far").ok();
    assert!(left.types("vmove context ls").ok().contains("ssh://root@far"));
    assert!(left.types("vmove host ls").ok().contains("third"));
    left.types(
        "rm ../bin/ssh; printf '#!/bin/sh\\necho no route >&2; exit 255\\n' >../bin/ssh; chmod +x ../bin/ssh",
    )
    .ok();
    left.types("vmove ls").refused(1, &["no route", "connection to the agent"]);
    left.types("vmove --context local ls").ok();
    left.types("vmove --context nowhere ls").refused(1, &["nowhere", "far", "local"]);
    left.types("vmove context use local && vmove ls && vmove context rm far").ok();
}
