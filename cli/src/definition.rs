//! VM definitions as people write them in TOML, and as they are shown and edited. Mistakes are told by line and column.
//!
//! Lives here: texts. Never enters: files (but for their names), what a host has (its agent checks that).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer};
use toml::Spanned;
use vmove_compute::net::MacAddress;
use vmove_storage::datastore::check_name;

use crate::agent::create::check_definition;
use crate::api::types::{DiskDefinition, DiskFormat, NetworkDefinition, VmDefinition};
use crate::render::units;

/// Largest definition that is read, bytes.
pub const MAX_TEXT: u64 = 1 << 20;

/// A definition, and the files it names, as they stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The VM. Disks that begin as a copy of an image may have 0 bytes: as many as it has.
    pub definition: VmDefinition,
    /// Kernel.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Images that disks begin as copies of, by the disks' names.
    pub images: BTreeMap<String, PathBuf>,
    /// What cloud-init in the guest shall find.
    pub cloud_init: Option<Seed>,
}

/// The table `[cloud_init]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    /// File with the user data (`#cloud-config` and so on).
    pub user_data: PathBuf,
    /// File with the network configuration.
    pub network_config: Option<PathBuf>,
    /// Name the guest gives itself; the VM's, if none is given.
    pub hostname: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Spanned<String>,
    #[serde(default = "one")]
    vcpus: Spanned<u8>,
    memory: Spanned<Size>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    #[serde(default)]
    cmdline: String,
    #[serde(default)]
    cpu_features: Vec<String>,
    #[serde(default)]
    apart: Vec<Spanned<String>>,
    #[serde(default)]
    disks: Vec<Spanned<Disk>>,
    #[serde(default)]
    networks: Vec<Spanned<Network>>,
    cloud_init: Option<Seed>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    name: Spanned<String>,
    size: Option<Spanned<Size>>,
    #[serde(default = "qcow2")]
    format: DiskFormat,
    #[serde(default)]
    datastore: String,
    image: Option<PathBuf>,
    #[serde(default)]
    read_only: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    name: Option<Spanned<String>>,
    bridge: Option<String>,
    tap: Option<String>,
    mac: Option<Spanned<MacAddress>>,
}

fn one() -> Spanned<u8> {
    Spanned::new(0..0, 1)
}

fn qcow2() -> DiskFormat {
    DiskFormat::Qcow2
}

/// Bytes, as a number or in words ("10GiB").
#[derive(Debug, Clone, Copy)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a size is a number of bytes, or words as in \"10GiB\"")]
        enum Form {
            Bytes(u64),
            Words(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Bytes(bytes) => Ok(Self(bytes)),
            Form::Words(words) => units::parse_size(&words).map(Self).map_err(serde::de::Error::custom),
        }
    }
}

/// Reads a definition. The error names line and column.
pub fn parse(text: &str) -> Result<Written, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
    let wrong = |span: Range<usize>, what: String| Err(point(text, span, &what));
    let named = |what: &'static str, name: &Spanned<String>| {
        check_name(what, name.get_ref()).map_err(|e| point(text, name.span(), &e.to_string()))
    };
    named("VM", &file.name)?;
    let memory = file.memory.get_ref().0;
    if memory == 0 || !memory.is_multiple_of(1 << 20) {
        return wrong(
            file.memory.span(),
            "memory must be a whole number of MiB, as in \"512MiB\"".to_owned(),
        );
    }
    if !(1..=64).contains(file.vcpus.get_ref()) {
        return wrong(file.vcpus.span(), "vcpus must be 1 to 64".to_owned());
    }
    for group in &file.apart {
        named("group", group)?;
    }
    let mut images = BTreeMap::new();
    let (mut disks, mut names) = (Vec::new(), BTreeSet::new());
    for spanned in file.disks {
        let (span, disk) = (spanned.span(), spanned.into_inner());
        named("disk", &disk.name)?;
        let name = disk.name.get_ref().clone();
        if !names.insert(name.clone()) {
            return wrong(disk.name.span(), format!("disk {name:?} is there twice"));
        }
        let size_bytes = match (&disk.size, &disk.image) {
            (Some(size), _) if size.get_ref().0 == 0 || !size.get_ref().0.is_multiple_of(512) => {
                return wrong(size.span(), "the size must be a multiple of 512 bytes, and not 0".to_owned());
            }
            (Some(size), _) => size.get_ref().0,
            (None, Some(_)) => 0,
            (None, None) => return wrong(span, format!("disk {name:?} needs a size, or an image")),
        };
        if let Some(image) = disk.image {
            images.insert(name.clone(), image);
        }
        let (format, datastore, read_only) = (disk.format, disk.datastore, disk.read_only);
        disks.push(DiskDefinition { name, format, size_bytes, datastore, read_only });
    }
    let (mut networks, mut names, mut macs) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for (index, spanned) in file.networks.into_iter().enumerate() {
        let (span, network) = (spanned.span(), spanned.into_inner());
        let name = match &network.name {
            Some(name) => {
                named("network", name)?;
                name.get_ref().clone()
            }
            None => format!("eth{index}"),
        };
        let at = network.name.as_ref().map_or(span.clone(), Spanned::span);
        if !names.insert(name.clone()) {
            return wrong(at, format!("network {name:?} is there twice"));
        }
        if let Some(mac) = &network.mac
            && !macs.insert(*mac.get_ref())
        {
            return wrong(mac.span(), format!("MAC address {} is there twice", mac.get_ref()));
        }
        let mac = network.mac.map(Spanned::into_inner);
        let network = NetworkDefinition { name, bridge: network.bridge, tap: network.tap, mac };
        if network.attachment().is_none() {
            return wrong(span, format!("network {:?} needs a bridge or a tap, and not both", network.name));
        }
        networks.push(network);
    }
    let definition = VmDefinition {
        name: file.name.into_inner(),
        vcpus: file.vcpus.into_inner(),
        memory_mib: memory >> 20,
        cmdline: file.cmdline,
        cpu_features: file.cpu_features,
        disks,
        networks,
        apart: file.apart.into_iter().map(Spanned::into_inner).collect(),
    };
    check_rest(&definition)?;
    let (kernel, initrd, cloud_init) = (file.kernel, file.initrd, file.cloud_init);
    Ok(Written { definition, kernel, initrd, images, cloud_init })
}

/// What the agent will check, as far as it does not depend on what the agent fills in.
fn check_rest(definition: &VmDefinition) -> Result<(), String> {
    let mut filled = definition.clone();
    for disk in filled.disks.iter_mut().filter(|disk| disk.size_bytes == 0) {
        disk.size_bytes = 512;
    }
    let macs = (0..=u8::MAX).cycle().map(|n| MacAddress::local([0xfe, 0xff, 0xff, 0xff, 0xff, n]));
    for (network, mac) in filled.networks.iter_mut().zip(macs).filter(|(network, _)| network.mac.is_none()) {
        network.mac = Some(mac);
    }
    check_definition(&filled).map_err(|e| e.message)
}

/// A message with the place in the text it is about, as TOML's own errors have it.
fn point(text: &str, span: Range<usize>, what: &str) -> String {
    let start = span.start.min(text.len());
    let before = &text[..start];
    let line = before.matches('\n').count() + 1;
    let begin = before.rfind('\n').map_or(0, |at| at + 1);
    let column = text[begin..start].chars().count() + 1;
    let shown = text[begin..].lines().next().unwrap_or_default();
    let margin = " ".repeat(line.to_string().len());
    let end = span.end.clamp(start, begin + shown.len().max(start - begin));
    let marks = "^".repeat(text[start..end].chars().count().max(1));
    format!(
        "TOML parse error at line {line}, column {column}\n{margin} |\n{line} | {shown}\n{margin} | {}{marks}\n{what}",
        " ".repeat(column - 1)
    )
}

/// A definition as people write it; [`parse`] reads it back.
pub fn render(vm: &VmDefinition) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let list = |words: &[String]| toml::Value::from(words.to_vec()).to_string();
    let size = |bytes: u64| match bytes {
        _ if bytes > 0 && bytes.is_multiple_of(1 << 30) => format!("\"{}GiB\"", bytes >> 30),
        _ if bytes > 0 && bytes.is_multiple_of(1 << 20) => format!("\"{}MiB\"", bytes >> 20),
        _ => format!("\"{bytes}B\""),
    };
    let mut text = format!("name = {}\nvcpus = {}\n", quoted(&vm.name), vm.vcpus);
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(text, "memory = {}", size(vm.memory_mib.saturating_mul(1 << 20)));
    let _ = writeln!(text, "cmdline = {}", quoted(&vm.cmdline));
    if !vm.cpu_features.is_empty() {
        let _ = writeln!(
            text,
            "# What the guest was given at its first start; it runs only where all of them are offered.\ncpu_features = {}",
            list(&vm.cpu_features)
        );
    }
    if !vm.apart.is_empty() {
        let _ = writeln!(text, "apart = {}", list(&vm.apart));
    }
    for disk in &vm.disks {
        let format = if disk.format == DiskFormat::Raw { "raw" } else { "qcow2" };
        let _ = write!(
            text,
            "\n[[disks]]\nname = {}\nsize = {}\nformat = \"{format}\"\ndatastore = {}\n",
            quoted(&disk.name),
            size(disk.size_bytes),
            quoted(&disk.datastore)
        );
        if disk.read_only {
            text.push_str("read_only = true\n");
        }
    }
    for network in &vm.networks {
        let _ = writeln!(text, "\n[[networks]]\nname = {}", quoted(&network.name));
        for (key, value) in [
            ("bridge", network.bridge.clone()),
            ("tap", network.tap.clone()),
            ("mac", network.mac.map(|mac| mac.to_string())),
        ] {
            if let Some(value) = value {
                let _ = writeln!(text, "{key} = {}", quoted(&value));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const WEB: &str = r#"
name = "web01"
vcpus = 2
memory = "2GiB"
kernel = "vmlinuz"
cmdline = "console=ttyS0 root=/dev/vda1"
apart = ["web"]

[[disks]]
name = "vda"
image = "debian-12.qcow2"
datastore = "fast"

[[disks]]
name = "data"
size = "10GiB"
format = "raw"

[[networks]]
bridge = "br0"

[[networks]]
name = "backup"
tap = "tap7"
mac = "52:54:00:12:34:56"

[cloud_init]
user_data = "user-data.yaml"
"#;

    #[test]
    fn a_definition_is_read_and_written() {
        let web = parse(WEB).unwrap();
        let vm = &web.definition;
        assert_eq!((vm.name.as_str(), vm.vcpus, vm.memory_mib, vm.apart.len()), ("web01", 2, 2048, 1));
        assert_eq!((vm.disks[0].size_bytes, vm.disks[1].size_bytes), (0, 10 << 30));
        assert_eq!((vm.networks[0].name.as_str(), vm.networks[1].name.as_str()), ("eth0", "backup"));
        assert_eq!(web.images["vda"], Path::new("debian-12.qcow2"));
        assert_eq!(web.cloud_init.unwrap().user_data, Path::new("user-data.yaml"));
        let mut made = vm.clone();
        made.disks[0].size_bytes = 3 << 20;
        made.disks[1].read_only = true;
        made.disks[1].size_bytes = 512;
        made.cpu_features = vec!["avx2".into()];
        made.cmdline = "odd=\"x\\y\" äö".into();
        made.networks[0].mac = Some("52:54:00:00:00:01".parse().unwrap());
        assert_eq!(parse(&render(&made)).unwrap().definition, made);
        assert_eq!(parse("name = \"a\"\nmemory = \"64MiB\"\n").unwrap().definition.vcpus, 1);
    }

    #[test]
    fn mistakes_are_told_by_line_and_column() {
        for (good, bad, place, words) in [
            ("vcpus = 2", "vcpus = 0", "line 3, column 9", "1 to 64"),
            ("vcpus = 2", "cpus = 2", "line 3, column 1", "unknown field `cpus`"),
            ("\"2GiB\"", "\"2GB of RAM\"", "line 4, column 10", "2GB"),
            ("\"2GiB\"", "1000", "line 4, column 10", "whole number of MiB"),
            ("name = \"web01\"", "name = \"../web\"", "line 2, column 8", "begin with a dot"),
            ("name = \"web01\"\n", "\n", "line 1, column 1", "missing field `name`"),
            ("name = \"data\"", "name = \"vda\"", "line 15, column 8", "twice"),
            ("size = \"10GiB\"", "size = 1000", "line 16, column 8", "multiple of 512"),
            ("size = \"10GiB\"\n", "\n", "line 14, column 1", "needs a size"),
            ("format = \"raw\"", "format = \"vmdk\"", "line 17, column 10", "vmdk"),
            ("bridge = \"br0\"", "bridge = \"br0\"\ntap = \"tap0\"", "line 19, column 1", "not both"),
            ("52:54:00:12:34:56", "52:54", "line 25, column 7", "no MAC address"),
            ("[\"web\"]", "[\"web\", \"-x\"]", "line 7, column 17", "begin with"),
            ("[cloud_init]", "[cloudinit]", "line 27, column 2", "unknown field `cloudinit`"),
        ] {
            let text = WEB.replace(good, bad);
            assert_ne!(text, WEB);
            let error = parse(&text).unwrap_err();
            assert!(error.contains(place) && error.contains(words), "{bad}: {error}");
        }
        let long = WEB.replace("console=ttyS0", &"x".repeat(3000));
        assert!(parse(&long).unwrap_err().contains("command line"));
    }

    #[test]
    fn any_text_is_read_or_refused() {
        for text in
            ["", "\0", "name", "name = \"ä\"\nmemory = 0", "memory = \"9999999999999999999GiB\"\nname=\"a\""]
        {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(point("äö = 1", 5..99, "x").contains("line 1, column 4"));
    }
}
