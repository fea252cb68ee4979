//! Where a VM goes, and how gently: what a move and its estimate are told alike.
//!
//! Never enters: asking the agent.

use std::collections::BTreeMap;
use std::time::Duration;

use super::CommandError;
use crate::api::types::MoveRequest;
use crate::render::units;

/// The VM, where it goes, and limits on the way.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Destination {
    /// The VM, which must run
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Host it shall run on
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Datastore its disks shall lie in
    #[arg(long, value_name = "DATASTORE")]
    pub datastore: Option<String>,
    /// Datastore of one disk (repeat for more)
    #[arg(long, value_name = "NAME=DATASTORE", value_parser = disk_target)]
    pub disk: Vec<(String, String)>,
    /// Longest pause to aim at
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// Cap on the data rate, as in 1GiB/s [default: none]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
}

impl Destination {
    /// No target is named.
    pub fn is_nowhere(&self) -> bool {
        self.host.is_none() && self.datastore.is_none() && self.disk.is_empty()
    }

    /// The usage error for that.
    pub fn where_to(&self) -> CommandError {
        CommandError::Usage(format!(
            "where to? Name --host, --datastore or --disk to move the VM '{}' ('vmove --help' lists the commands)",
            self.vm
        ))
    }

    /// The move that this asks for.
    pub fn request(&self) -> Result<MoveRequest, CommandError> {
        if self.is_nowhere() {
            return Err(self.where_to());
        }
        let mut disks = BTreeMap::new();
        for (name, datastore) in &self.disk {
            if disks.insert(name.clone(), datastore.clone()).is_some() {
                return Err(CommandError::Usage(format!("--disk {name} is given twice")));
            }
        }
        Ok(MoveRequest {
            host: self.host.clone(),
            datastore: self.datastore.clone(),
            disks,
            max_downtime_ms: self.max_downtime.as_millis() as u64,
            bandwidth: self.bandwidth,
            ..MoveRequest::default()
        })
    }
}

fn disk_target(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, datastore)) if !name.is_empty() && !datastore.is_empty() => {
            Ok((name.to_owned(), datastore.to_owned()))
        }
        _ => Err("expected NAME=DATASTORE".to_owned()),
    }
}

pub(super) fn rate(text: &str) -> Result<u64, String> {
    match units::parse_rate(text) {
        Ok(0) => Err("a rate of 0 would never end".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> Destination {
        Destination {
            vm: "vm1".into(),
            host: None,
            datastore: None,
            disk: Vec::new(),
            max_downtime: Duration::from_millis(50),
            bandwidth: None,
        }
    }

    #[test]
    fn a_move_to_nowhere_is_a_usage_error() {
        assert!(nowhere().request().is_err_and(|e| e.code() == 2 && e.to_string().contains("vm1")));
        let twice =
            Destination { disk: vec![("a".into(), "x".into()), ("a".into(), "y".into())], ..nowhere() };
        assert!(twice.request().is_err_and(|e| e.code() == 2));
        let good = Destination { host: Some("b".into()), ..nowhere() };
        assert!(good.request().is_ok_and(|r| r.max_downtime_ms == 50 && r.host.as_deref() == Some("b")));
    }

    #[test]
    fn disk_words() {
        assert_eq!(disk_target("vda=fast"), Ok(("vda".into(), "fast".into())));
        assert!(disk_target("vda").is_err() && disk_target("=x").is_err() && disk_target("x=").is_err());
        assert!(rate("0").is_err() && rate("1GiB/s").is_ok());
    }
}
