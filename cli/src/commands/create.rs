//! `vmove create`: a VM from words on the command line or from a TOML file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{CommandError, is_reserved};
use crate::api::definitions::CloudInit;
use crate::api::types::{CreateVm, DiskDefinition, DiskFormat, NetworkDefinition, VmDefinition};
use crate::client::Client;
use crate::definition::{self, Seed, Written};
use crate::render::{self, units};

/// The disk that `--from` makes.
const FIRST_DISK: &str = "vda";

/// Arguments of `vmove create`.
#[derive(Debug, Clone, clap::Args)]
pub struct CreateArgs {
    /// Name of the VM: letters, digits, '.', '_', '-'
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// Definition in TOML instead of the options ('vmove show VM --toml' shows what it looks like); paths in it begin where it is
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with_all = ["name", "from", "cmdline", "vcpus", "memory", "disk", "net", "apart", "user_data"])]
    pub file: Option<PathBuf>,
    /// The first disk, vda, is to begin with the contents of this image (qcow2 or raw), as a cloud image
    #[arg(long, value_name = "IMAGE")]
    pub from: Option<PathBuf>,
    /// Its size, if it is to be larger than the image's
    #[arg(long, value_name = "SIZE", requires = "from", value_parser = bytes)]
    pub size: Option<u64>,
    /// Kernel to boot: an ELF with a PVH note, or a bzImage (needed here or in the file)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub vcpus: u8,
    /// RAM, as in 512MiB
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = memory_mib)]
    pub memory: u64,
    /// A disk: name=vda,size=2GiB[,datastore=fast][,format=qcow2|raw][,from=IMAGE][,readonly] (repeat for more)
    #[arg(long, value_name = "SPEC", value_parser = disk)]
    pub disk: Vec<DiskSpec>,
    /// A network interface: bridge=br0[,mac=52:54:00:12:34:56][,name=eth0], or tap=tap0 for one made by hand (repeat for more)
    #[arg(long, value_name = "SPEC", value_parser = net)]
    pub net: Vec<NetworkDefinition>,
    /// A group of VMs of which no host should run two (repeat for more)
    #[arg(long, value_name = "GROUP")]
    pub apart: Vec<String>,
    /// User data for cloud-init in the guest (#cloud-config and so on), on a read-only disk of its own
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Print the new VM as JSON
    #[arg(long)]
    pub json: bool,
}

/// One `--disk` word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The disk.
    pub disk: DiskDefinition,
    /// Image it begins as a copy of.
    pub from: Option<PathBuf>,
}

fn bytes(text: &str) -> Result<u64, String> {
    units::parse_size(text).map_err(|error| error.to_string())
}

fn memory_mib(text: &str) -> Result<u64, String> {
    let bytes = units::parse_size(text).map_err(|error| error.to_string())?;
    if bytes == 0 || !bytes.is_multiple_of(1 << 20) {
        return Err("RAM must be a whole number of MiB, as in 512MiB".to_owned());
    }
    Ok(bytes >> 20)
}

fn disk(text: &str) -> Result<DiskSpec, String> {
    let mut name = None;
    let mut size_bytes = None;
    let mut datastore = None;
    let mut format = None;
    let mut from = None;
    let mut read_only = None;
    for word in text.split(',') {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let taken = match key {
            "name" => name.replace(value.to_owned()).is_some(),
            "size" => {
                size_bytes.replace(units::parse_size(value).map_err(|e| format!("size: {e}"))?).is_some()
            }
            "datastore" => datastore.replace(value.to_owned()).is_some(),
            "format" => format.replace(image_format(value)?).is_some(),
            "from" => from.replace(PathBuf::from(value)).is_some(),
            "readonly" if value.is_empty() => read_only.replace(true).is_some(),
            _ => {
                return Err(format!(
                    "unknown word '{word}' (known: name, size, datastore, format, from, readonly)"
                ));
            }
        };
        if taken {
            return Err(format!("'{key}' is given twice"));
        }
    }
    let name = name.filter(|name| !name.is_empty()).ok_or("name= is missing")?;
    let size_bytes = match (size_bytes, &from) {
        (Some(0), _) => return Err("size must not be 0".to_owned()),
        (Some(size), _) => size,
        // The agent takes the image's own size.
        (None, Some(_)) => 0,
        (None, None) => return Err("size= is missing (or from=IMAGE)".to_owned()),
    };
    let disk = DiskDefinition {
        name,
        format: format.unwrap_or(DiskFormat::Qcow2),
        size_bytes,
        datastore: datastore.unwrap_or_default(),
        read_only: read_only.unwrap_or(false),
    };
    Ok(DiskSpec { disk, from })
}

fn net(text: &str) -> Result<NetworkDefinition, String> {
    let mut network = NetworkDefinition { name: String::new(), bridge: None, tap: None, mac: None };
    for word in text.split(',') {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let taken = match key {
            "name" => !std::mem::replace(&mut network.name, value.to_owned()).is_empty(),
            "bridge" => network.bridge.replace(value.to_owned()).is_some(),
            "tap" => network.tap.replace(value.to_owned()).is_some(),
            "mac" => {
                let mac = value.parse().map_err(|e: vmove_compute::net::BadMac| e.to_string())?;
                network.mac.replace(mac).is_some()
            }
            _ => return Err(format!("unknown word '{word}' (known: bridge, tap, mac, name)")),
        };
        if taken {
            return Err(format!("'{key}' is given twice"));
        }
    }
    match network.attachment() {
        Some(_) => Ok(network),
        None => Err("bridge= is missing (or tap=), or both are given".to_owned()),
    }
}

/// Networks without a name are called after their place.
fn named(networks: &[NetworkDefinition]) -> Vec<NetworkDefinition> {
    let mut networks = networks.to_vec();
    for (index, network) in networks.iter_mut().enumerate().filter(|(_, network)| network.name.is_empty()) {
        network.name = format!("eth{index}");
    }
    networks
}

fn image_format(text: &str) -> Result<DiskFormat, String> {
    match text {
        "qcow2" => Ok(DiskFormat::Qcow2),
        "raw" => Ok(DiskFormat::Raw),
        _ => Err(format!("unknown format '{text}' (known: qcow2, raw)")),
    }
}

impl CreateArgs {
    /// What the options say.
    fn written(&self, name: &str) -> Written {
        let mut disks: Vec<DiskSpec> = self.disk.clone();
        if let Some(image) = &self.from {
            let disk = DiskDefinition {
                name: FIRST_DISK.to_owned(),
                format: DiskFormat::Qcow2,
                size_bytes: self.size.unwrap_or(0),
                datastore: String::new(),
                read_only: false,
            };
            disks.insert(0, DiskSpec { disk, from: Some(image.clone()) });
        }
        let images = disks.iter().filter_map(|spec| Some((spec.disk.name.clone(), spec.from.clone()?)));
        Written {
            images: images.collect(),
            definition: VmDefinition {
                name: name.to_owned(),
                vcpus: self.vcpus,
                memory_mib: self.memory,
                cmdline: self.cmdline.clone(),
                cpu_features: Vec::new(),
                disks: disks.into_iter().map(|spec| spec.disk).collect(),
                networks: named(&self.net),
                apart: self.apart.clone(),
            },
            kernel: None,
            initrd: None,
            cloud_init: self.user_data.clone().map(|user_data| Seed { user_data, ..Seed::default() }),
        }
    }

    fn request(&self) -> Result<CreateVm, CommandError> {
        let (written, base) = match (&self.file, &self.name) {
            (Some(file), _) => (read_definition(file)?, file.parent().unwrap_or(Path::new("")).to_path_buf()),
            (None, Some(name)) => (self.written(name), PathBuf::new()),
            (None, None) => return Err(CommandError::Usage("a name or --file is needed".to_owned())),
        };
        let definition = written.definition;
        if is_reserved(&definition.name) {
            return Err(CommandError::Usage(format!(
                "'{}' is a command of vmove: 'vmove {} ...' would not reach a VM of this name; choose another",
                definition.name, definition.name
            )));
        }
        let given = |option: &Option<PathBuf>, in_file: Option<PathBuf>| {
            let path = option.clone().or_else(|| Some(base.join(in_file?)));
            path.as_deref().map(absolute).transpose()
        };
        let kernel = given(&self.kernel, written.kernel)?.ok_or_else(|| {
            CommandError::Usage("a kernel is needed: --kernel, or kernel = in the file".to_owned())
        })?;
        let initrd = given(&self.initrd, written.initrd)?;
        let images = written.images.into_iter();
        let images = images.map(|(disk, image)| Ok::<_, CommandError>((disk, absolute(&base.join(image))?)));
        let images = images.collect::<Result<BTreeMap<_, _>, _>>()?;
        let cloud_init = written.cloud_init.map(|seed| read_seed(&base, seed)).transpose()?;
        Ok(CreateVm { definition, kernel, initrd, images, cloud_init })
    }

    /// Creates the VM and prints its name.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let vm = client.create(&self.request()?).await?;
        if self.json {
            render::print_json(&vm)?;
        } else {
            render::print(&format!(
                "{} created on {}; start it with 'vmove start {}'\n",
                vm.name, vm.host, vm.name
            ))?;
        }
        Ok(())
    }
}

/// The agent reads the file itself and has another working directory.
fn absolute(path: &Path) -> Result<PathBuf, CommandError> {
    std::fs::canonicalize(path).map_err(|error| CommandError::failed(format!("{}: {error}", path.display())))
}

fn read_definition(path: &Path) -> Result<Written, CommandError> {
    definition::parse(&read_text(path)?)
        .map_err(|error| CommandError::failed(format!("{}: {error}", path.display())))
}

fn read_seed(base: &Path, seed: Seed) -> Result<CloudInit, CommandError> {
    Ok(CloudInit {
        user_data: read_text(&base.join(seed.user_data))?,
        network_config: seed.network_config.map(|path| read_text(&base.join(path))).transpose()?,
        hostname: seed.hostname,
    })
}

/// Reads a file that people wrote.
fn read_text(path: &Path) -> Result<String, CommandError> {
    let fail = |reason: &dyn std::fmt::Display| CommandError::failed(format!("{}: {reason}", path.display()));
    let length = std::fs::metadata(path).map_err(|error| fail(&error))?.len();
    if length > definition::MAX_TEXT {
        return Err(fail(&format!("{length} bytes are too many; at most {} are read", definition::MAX_TEXT)));
    }
    std::fs::read_to_string(path).map_err(|error| fail(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_words_are_understood() {
        let spec = disk("name=vda,size=2GiB,datastore=fast,format=raw,readonly");
        assert_eq!(
            spec,
            Ok(DiskSpec {
                disk: DiskDefinition {
                    name: "vda".into(),
                    format: DiskFormat::Raw,
                    size_bytes: 2 << 30,
                    datastore: "fast".into(),
                    read_only: true,
                },
                from: None,
            })
        );
        let from = disk("name=vda,from=/images/x.qcow2");
        assert!(
            from.is_ok_and(|s| s.disk.size_bytes == 0 && s.from == Some(PathBuf::from("/images/x.qcow2")))
        );
    }

    #[test]
    fn wrong_disk_words_are_named() {
        for (text, part) in [
            ("size=1G", "name="),
            ("name=a", "size="),
            ("name=a,size=0", "must not be 0"),
            ("name=a,size=1G,size=2G", "twice"),
            ("name=a,size=1G,colour=red", "colour=red"),
            ("name=a,size=1G,format=vmdk", "vmdk"),
            ("name=a,size=huge", "size:"),
        ] {
            assert!(disk(text).is_err_and(|e| e.contains(part)), "{text}");
        }
        assert!(memory_mib("1.5k").is_err() && memory_mib("0").is_err());
        assert_eq!(memory_mib("2GiB"), Ok(2048));
    }

    #[test]
    fn network_words_are_understood_and_wrong_ones_named() {
        let given = net("bridge=br0,mac=52:54:00:12:34:56,name=lan").unwrap();
        assert_eq!((given.name.as_str(), given.bridge.as_deref()), ("lan", Some("br0")));
        assert_eq!(given.mac.map(|mac| mac.to_string()).as_deref(), Some("52:54:00:12:34:56"));
        let names: Vec<_> = named(&[net("bridge=a").unwrap(), given, net("tap=t").unwrap()])
            .into_iter()
            .map(|network| network.name)
            .collect();
        assert_eq!(names, ["eth0", "lan", "eth2"]);
        for (text, part) in [
            ("mac=52:54:00:12:34:56", "bridge="),
            ("bridge=a,tap=b", "both"),
            ("bridge=a,bridge=b", "twice"),
            ("bridge=a,mac=ff:ff:ff:ff:ff:ff", "multicast"),
            ("bridge=a,mac=52:54", "52:54"),
            ("bridge=a,vlan=5", "vlan=5"),
        ] {
            assert!(net(text).is_err_and(|e| e.contains(part)), "{text}");
        }
    }

    #[test]
    fn a_definition_file_with_a_mistake_names_line_and_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, "name = \"a\"\nmemory = \"64MiB\"\ncolour = 1\n").unwrap();
        let error = read_definition(&path).unwrap_err().to_string();
        assert!(error.contains("vm.toml") && error.contains("line 3"), "{error}");
        std::fs::write(&path, "name = \"a\"\nmemory = \"64MiB\"\n").unwrap();
        assert_eq!(read_definition(&path).unwrap().definition.vcpus, 1);
    }

    #[test]
    fn paths_in_a_file_begin_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
        let text = "name = \"a\"\nmemory = \"64MiB\"\nkernel = \"k\"\n[[disks]]\nname = \"vda\"\nimage = \"i.raw\"\n\
                    [cloud_init]\nuser_data = \"u\"\n";
        for (name, text) in [("vm.toml", text), ("k", ""), ("i.raw", ""), ("u", "#cloud-config\n")] {
            std::fs::write(at(name), text).unwrap();
        }
        let words = ["create", "-f"].into_iter().map(Into::into).chain([at("vm.toml").into_os_string()]);
        let create = |more: Vec<std::ffi::OsString>| {
            let words = std::iter::once("vmove".into()).chain(words.clone()).chain(more);
            match super::super::parse(words).unwrap().command {
                super::super::Command::Create(args) => args.request(),
                other => panic!("{other:?}"),
            }
        };
        let request = create(vec![]).unwrap();
        assert_eq!((&request.kernel, &request.images["vda"]), (&at("k"), &at("i.raw")));
        assert_eq!(request.cloud_init.unwrap().user_data, "#cloud-config\n");
        std::fs::remove_file(at("k")).unwrap();
        assert!(create(vec![]).unwrap_err().to_string().contains("/k: No such file"));
        assert_eq!(create(vec!["--kernel".into(), at("i.raw").into()]).unwrap().kernel, at("i.raw"));
    }
}
