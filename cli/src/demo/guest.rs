//! The console lines of the fixture guest (`fixtures/guest/README.md`), parsed.
//!
//! Lives here: text to values. A line that is not understood is no error: a console begins and ends in mid-line.

use std::collections::BTreeMap;

use serde::Serialize;

/// How many of the last lines are kept for error messages.
const TAIL: usize = 12;

/// One `hb` line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Number of the line.
    pub seq: u64,
    /// Largest distance between two ticks of the guest since the line before, us, by the guest's clock.
    pub gap_us: u64,
    /// Wrong pages found so far.
    pub ram_errors: u64,
    /// Wrong blocks found so far.
    pub disk_errors: u64,
}

/// One `check` line: everything was looked at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Wrong pages since the guest began.
    pub ram_errors: u64,
    /// Wrong blocks since the guest began.
    pub disk_errors: u64,
    /// Pages looked at.
    pub checked_pages: u64,
    /// Blocks looked at.
    pub checked_blocks: u64,
}

/// Everything a guest has said that matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestLog {
    /// It has filled its memory and disk.
    pub ready: bool,
    /// Heartbeats, each number once, growing.
    pub heartbeats: Vec<Heartbeat>,
    /// The last full check.
    pub check: Option<Check>,
    /// `error` lines, each text once.
    pub errors: Vec<String>,
    /// The last lines, whatever they are.
    pub tail: Vec<String>,
}

impl GuestLog {
    /// Takes a line in. Lines that were seen before (a console repeats its recent output to who connects) change nothing.
    pub fn line(&mut self, line: &str) {
        let line = line.trim_end_matches('\r');
        if let Some(rest) = line.strip_prefix("hb ") {
            if let Some(heartbeat) = heartbeat(rest)
                && self.heartbeats.last().is_none_or(|last| heartbeat.seq > last.seq)
            {
                self.heartbeats.push(heartbeat);
            }
        } else if let Some(rest) = line.strip_prefix("check ") {
            self.check = check(rest).or(self.check);
        } else if line.starts_with("vmove-guest ready ") {
            self.ready = true;
        } else if line.starts_with("error ") && !self.errors.iter().any(|seen| seen == line) {
            self.errors.push(line.to_owned());
        }
        if self.tail.len() == TAIL {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
    }

    /// Number of the newest heartbeat, 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.heartbeats.last().map_or(0, |heartbeat| heartbeat.seq)
    }

    /// Heartbeats with a number beyond `seq`.
    pub fn since(&self, seq: u64) -> impl Iterator<Item = &Heartbeat> {
        self.heartbeats.iter().filter(move |heartbeat| heartbeat.seq > seq)
    }

    /// Largest gap among the heartbeats beyond `seq`, ms.
    pub fn largest_gap_ms(&self, seq: u64) -> f64 {
        self.since(seq).map(|heartbeat| heartbeat.gap_us).max().unwrap_or(0) as f64 / 1000.0
    }
}

fn heartbeat(text: &str) -> Option<Heartbeat> {
    let values = values(text);
    let get = |key: &str| values.get(key).copied();
    // The last key of the line stands for its completeness.
    get("irqs")?;
    Some(Heartbeat {
        seq: get("seq")?,
        gap_us: get("gap_us")?,
        ram_errors: get("ram_errors")?,
        disk_errors: get("disk_errors")?,
    })
}

fn check(text: &str) -> Option<Check> {
    let values = values(text);
    let get = |key: &str| values.get(key).copied();
    Some(Check {
        ram_errors: get("ram_errors")?,
        disk_errors: get("disk_errors")?,
        checked_pages: get("checked_pages")?,
        checked_blocks: get("checked_blocks")?,
    })
}

fn values(text: &str) -> BTreeMap<&str, u64> {
    text.split(' ')
        .filter_map(|word| word.split_once('='))
        .filter_map(|(k, v)| Some((k, v.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hb(seq: u64, gap: u64) -> String {
        format!(
            "hb seq={seq} up_ms=1 gap_us={gap} max_gap_us=9 ram_errors=0 disk_errors=0 checked_pages=1 checked_blocks=1 \
             written_pages=1 written_blocks=1 flushed_seq=1 irqs=1"
        )
    }

    #[test]
    fn repeated_and_broken_lines_change_nothing() {
        let mut log = GuestLog::default();
        for line in [
            "p_ms=3 gap_us=1",
            "vmove-guest ready cpus=1 ram_pages=2 disk_blocks=3",
            &hb(1, 2000),
            &hb(2, 90_000),
        ] {
            log.line(line);
        }
        log.line(&hb(1, 2000));
        log.line("hb seq=3 up_ms=1 gap_us=99999999");
        log.line(&hb(3, 2100));
        assert!(log.ready);
        assert_eq!(log.heartbeats.iter().map(|h| h.seq).collect::<Vec<_>>(), [1, 2, 3]);
        assert!((log.largest_gap_ms(0) - 90.0).abs() < 1e-9);
        assert!((log.largest_gap_ms(2) - 2.1).abs() < 1e-9);
        assert_eq!(log.since(1).count(), 2);
    }

    #[test]
    fn checks_and_errors_are_kept() {
        let mut log = GuestLog::default();
        log.line("error ram page=5 want_seq=1 got_seq=0\r");
        log.line("error ram page=5 want_seq=1 got_seq=0");
        log.line("check ram_errors=1 disk_errors=0 checked_pages=10 checked_blocks=20");
        assert_eq!(log.errors.len(), 1);
        assert_eq!(
            log.check,
            Some(Check { ram_errors: 1, disk_errors: 0, checked_pages: 10, checked_blocks: 20 })
        );
        for _ in 0..50 {
            log.line("x");
        }
        assert_eq!(log.tail.len(), TAIL);
    }
}
