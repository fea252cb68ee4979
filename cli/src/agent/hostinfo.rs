//! What this host has: processors, memory, CPU features.
//!
//! Lives here: reading `/proc`. Never enters: datastores, other hosts.

use std::collections::BTreeSet;

use super::error::ApiError;

/// Memory of the host, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it (`MemTotal`).
    pub total: u64,
    /// What can be had without swapping (`MemAvailable`).
    pub available: u64,
}

/// Reads `/proc/meminfo` (proc(5)).
pub fn memory() -> Result<Memory, ApiError> {
    let text = read("/proc/meminfo")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .ok_or_else(|| ApiError::internal(format!("/proc/meminfo has no {name}")))
    };
    Ok(Memory { total: field("MemTotal:")?, available: field("MemAvailable:")? })
}

/// Features every processor of this host has, without those in `mask`, sorted.
pub fn cpu_features(mask: &[String]) -> Result<Vec<String>, ApiError> {
    Ok(features_of(&read("/proc/cpuinfo")?, mask))
}

fn features_of(cpuinfo: &str, mask: &[String]) -> Vec<String> {
    let mut common: Option<BTreeSet<&str>> = None;
    for line in cpuinfo.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        if key.trim() == "flags" {
            let flags: BTreeSet<&str> = value.split_whitespace().collect();
            common = Some(match common {
                Some(before) => before.intersection(&flags).copied().collect(),
                None => flags,
            });
        }
    }
    let offered = |flag: &&str| !mask.iter().any(|masked| masked == flag);
    common.unwrap_or_default().into_iter().filter(offered).map(str::to_owned).collect()
}

/// The time of day, milliseconds since 1970.
pub fn clock_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Processors that are online.
pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

fn read(path: &str) -> Result<String, ApiError> {
    std::fs::read_to_string(path).map_err(|e| ApiError::io("read", path.as_ref(), &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_those_of_every_processor_without_the_mask() {
        let text = "processor: 0\nflags\t\t: fpu sse avx\n\nprocessor: 1\nflags\t\t: sse avx aes\n";
        assert_eq!(features_of(text, &[]), ["avx", "sse"]);
        assert_eq!(features_of(text, &["avx".to_owned()]), ["sse"]);
        let memory = memory().unwrap();
        assert!(memory.available > 0 && memory.available <= memory.total);
    }
}
