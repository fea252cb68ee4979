//! The text of `agent.toml`: written with a word on every key and its default, changed later without losing what people wrote in it.
//!
//! Pure functions of texts. Never enters: files, and what the keys mean (`config`).

use std::fmt::Write as _;
use std::path::Path;

use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

use super::config::{Config, ConfigError, DatastoreConfig};

/// A configuration as a file for people: keys that are at their default are there as comments.
pub fn render(config: &Config, state: &Path) -> Result<String, ConfigError> {
    let none = Config::new(&config.name, config.listen);
    let quoted = |text: &str| value(text).to_string().trim().to_owned();
    let path = |path: &Path| {
        path.to_str()
            .map(quoted)
            .ok_or_else(|| ConfigError::Invalid { what: format!("the path {} is not UTF-8", path.display()) })
    };
    let list =
        |words: &[String]| value(words.iter().collect::<toml_edit::Array>()).to_string().trim().to_owned();
    let mut text = String::from(
        "# This host's vmove agent. Written by `vmove init` or `vmove join`, yours to edit; read when the agent starts.\n\
         # A line that begins with #key shows the default of a key. Unknown keys are refused.\n",
    );
    let mut key = |about: &str, key: &str, is_default: bool, is: &str| {
        let mark = if is_default { "#" } else { "" };
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "\n# {about}\n{mark}{key} = {is}");
    };
    key(
        "Name of this host, unique in the cluster. Its certificate carries it.",
        "name",
        false,
        &quoted(&config.name),
    );
    key(
        "Address (IP:PORT) that other agents reach this one at. The certificate carries the IP address.",
        "listen",
        false,
        &quoted(&config.listen.to_string()),
    );
    key(
        "Unix socket for commands on this host.",
        "socket",
        config.socket.is_none(),
        &path(&config.socket(state))?,
    );
    let first = config.datastores.first().map_or("", |store| &store.name);
    key(
        "Datastore for disks that name none; the first one below, if nothing is said.",
        "default_datastore",
        config.default_datastore.is_none(),
        &quoted(config.default_datastore.as_deref().unwrap_or(first)),
    );
    key(
        "CPU features (as in /proc/cpuinfo) that guests are not to build on, for the sake of hosts that lack them.",
        "cpu_mask",
        config.cpu_mask == none.cpu_mask,
        &list(&config.cpu_mask),
    );
    key(
        "No VM is taken from a host whose clock is further from this one's, milliseconds.",
        "max_clock_skew_ms",
        config.max_clock_skew_ms == none.max_clock_skew_ms,
        &config.max_clock_skew_ms.to_string(),
    );
    text.push_str("\n# Directories for disks. `vmove datastore add|rm` changes this list, without a restart of the agent.\n");
    if config.datastores.is_empty() {
        text.push_str("#[[datastores]]\n#name = \"fast\"\n#path = \"/srv/fast\"\n");
    }
    for store in &config.datastores {
        let _ =
            writeln!(text, "[[datastores]]\nname = {}\npath = {}", quoted(&store.name), path(&store.path)?);
    }
    text.push_str(
        "\n# Hosts known beforehand. Those that joined are in hosts.toml of the state directory.\n",
    );
    if config.hosts.is_empty() {
        text.push_str("#[[hosts]]\n#name = \"other\"\n#address = \"192.0.2.9:7070\"\n");
    }
    for host in &config.hosts {
        let _ =
            writeln!(text, "[[hosts]]\nname = {}\naddress = {}", quoted(&host.name), quoted(&host.address));
    }
    Ok(text)
}

/// The text with one more datastore, which takes disks that name none if `default`.
pub fn with_datastore(text: &str, store: &DatastoreConfig, default: bool) -> Result<String, String> {
    let mut document = parse(text)?;
    let path =
        store.path.to_str().ok_or_else(|| format!("the path {} is not UTF-8", store.path.display()))?;
    let mut table = Table::new();
    table["name"] = value(store.name.as_str());
    table["path"] = value(path);
    let stores = document.entry("datastores").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    stores.as_array_of_tables_mut().ok_or("its datastores are not [[datastores]] tables")?.push(table);
    if default {
        document["default_datastore"] = value(store.name.as_str());
    }
    Ok(document.to_string())
}

/// The text without a datastore.
pub fn without_datastore(text: &str, name: &str) -> Result<String, String> {
    let mut document = parse(text)?;
    if let Some(stores) = document.get_mut("datastores") {
        let stores = stores.as_array_of_tables_mut().ok_or("its datastores are not [[datastores]] tables")?;
        stores.retain(|table| table.get("name").and_then(Item::as_str) != Some(name));
    }
    if document.get("default_datastore").and_then(Item::as_str) == Some(name) {
        document.remove("default_datastore");
    }
    Ok(document.to_string())
}

fn parse(text: &str) -> Result<DocumentMut, String> {
    text.parse().map_err(|e: toml_edit::TomlError| e.to_string().trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            datastores: vec!["fast=/srv/fast".parse().unwrap()],
            ..Config::new("left", "127.0.0.1:7070".parse().unwrap())
        }
    }

    fn read(text: &str) -> Config {
        Config::parse(text, Path::new("agent.toml")).unwrap_or_else(|e| panic!("{e} in\n{text}"))
    }

    #[test]
    fn what_is_written_reads_back_and_its_comments_are_the_defaults() {
        let state = Path::new("/var/lib/vmove");
        let text = render(&config(), state).unwrap();
        assert_eq!(read(&text), config());
        let is_key = |line: &&str| {
            line.strip_prefix('#')
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '['))
        };
        let shown: String = text
            .lines()
            .map(|line| if is_key(&line) { &line[1..] } else { line })
            .fold(String::new(), |all, line| all + line + "\n");
        let shown = read(&shown);
        assert_eq!(shown.socket.as_deref(), Some(Path::new("/run/vmove/agent.sock")));
        assert_eq!((shown.cpu_mask, shown.max_clock_skew_ms), (Vec::<String>::new(), 5000));
        assert_eq!((shown.default_datastore.as_deref(), shown.hosts.len()), (Some("fast"), 1));
        // Every key there is, is shown.
        let keys = toml::Table::try_from(Config {
            socket: Some("/s".into()),
            default_datastore: Some("fast".into()),
            cpu_mask: vec!["x".into()],
            hosts: shown.hosts,
            ..config()
        })
        .unwrap();
        for key in keys.keys() {
            assert!(
                text.contains(&format!("{key} = ")) || text.contains(&format!("[[{key}]]")),
                "{key} is not shown"
            );
        }
        let odd = Config {
            socket: Some("/x/\"odd\".sock".into()),
            cpu_mask: vec!["avx2".into()],
            max_clock_skew_ms: 7,
            ..config()
        };
        assert_eq!(read(&render(&odd, state).unwrap()), odd);
    }

    #[test]
    fn datastores_come_and_go_and_what_people_wrote_stays() {
        let text = "# mine\nname = \"left\" # the left one\nlisten = \"127.0.0.1:7070\"\n";
        let bulk: DatastoreConfig = "bulk=/srv/bulk".parse().unwrap();
        let one = with_datastore(text, &"fast=/srv/fast".parse().unwrap(), false).unwrap();
        let two = with_datastore(&one, &bulk, true).unwrap();
        assert!(two.starts_with("# mine\nname = \"left\" # the left one\n"), "{two}");
        let both = read(&two);
        assert_eq!((both.datastores.len(), both.default_datastore.as_deref()), (2, Some("bulk")));
        let rest = without_datastore(&two, "bulk").unwrap();
        assert_eq!(read(&rest).datastores, config().datastores);
        assert_eq!(read(&rest).default_datastore, None);
        assert!(read(&without_datastore(&rest, "fast").unwrap()).datastores.is_empty());
        // As `init` writes it, too.
        let written = with_datastore(&render(&config(), Path::new("/x")).unwrap(), &bulk, true).unwrap();
        assert_eq!(read(&written).datastores.len(), 2);
        assert!(with_datastore("name = ", &bulk, false).unwrap_err().contains("line 1"));
    }
}
