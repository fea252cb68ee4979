//! Sizes, rates and durations as people write and read them.
//!
//! Lives here: pure conversions. Binary multiples are KiB, MiB, ... (a bare K, M, G, T means the same, as in `qemu-img`), decimal ones kB,
//! MB, .... Never enters: output.

use std::time::Duration;

/// A size, rate or duration that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No number at the beginning.
    #[error("'{0}' does not begin with a number")]
    NoNumber(String),
    /// A unit nobody knows.
    #[error("unknown unit '{unit}' in '{text}' (use {known})")]
    UnknownUnit {
        /// The whole text.
        text: String,
        /// The part that is no unit.
        unit: String,
        /// Units that are accepted.
        known: &'static str,
    },
    /// Larger than can be expressed, or not a whole number of bytes.
    #[error("'{0}' is out of range")]
    OutOfRange(String),
}

const SIZE_UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

/// Parses a size in bytes: `4096`, `512MiB`, `1.5GiB`, `2G`, `10GB`. Case does not matter.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text)?;
    let factor =
        SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(|| {
            UnitError::UnknownUnit {
                text: text.to_owned(),
                unit: unit.clone(),
                known: "KiB, MiB, GiB, TiB, kB, MB, GB, TB",
            }
        })?;
    scale(text, &number, factor)
}

/// Parses a rate in bytes per second: as [`parse_size`], with or without `/s`.
pub fn parse_rate(text: &str) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    parse_size(trimmed.strip_suffix("/s").unwrap_or(trimmed))
}

/// Parses a duration: `100ms`, `2s`, `1.5s`, `3m`, `1h`, `500us`. A bare number means milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text)?;
    let nanos = match unit.as_str() {
        "us" => 1_000,
        "" | "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => {
            return Err(UnitError::UnknownUnit { text: text.to_owned(), unit, known: "us, ms, s, m, h" });
        }
    };
    scale(text, &number, nanos).map(Duration::from_nanos)
}

/// Splits a number from the unit behind it; the unit comes back in lower case.
fn split(text: &str) -> Result<(String, String), UnitError> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(UnitError::NoNumber(text.to_owned()));
    }
    Ok((number.to_owned(), unit.trim().to_ascii_lowercase()))
}

/// Decimal number times factor, exact for whole numbers; a fraction is cut to the unit below.
fn scale(text: &str, number: &str, factor: u64) -> Result<u64, UnitError> {
    let out_of_range = || UnitError::OutOfRange(text.to_owned());
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| out_of_range())?;
    let mut result = whole.checked_mul(factor).ok_or_else(out_of_range)?;
    if !fraction.is_empty() {
        let part: f64 = format!("0.{fraction}").parse().map_err(|_| out_of_range())?;
        result = result.checked_add((part * factor as f64) as u64).ok_or_else(out_of_range)?;
    }
    Ok(result)
}

/// A size for people: `4.0 KiB`, `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    const NAMES: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut index = 0;
    while value >= 1023.95 && index + 1 < NAMES.len() {
        value /= 1024.0;
        index += 1;
    }
    if index == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", NAMES[index]) }
}

/// A rate for people: `1.5 GiB/s`.
pub fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", size(bytes_per_s))
}

/// Milliseconds for people: `0.8 ms`, `42.0 ms`, `1.3 s`, `2 min 5 s`.
pub fn millis(ms: f64) -> String {
    if ms < 1000.0 {
        format!("{ms:.1} ms")
    } else if ms < 120_000.0 {
        format!("{:.1} s", ms / 1000.0)
    } else {
        let seconds = (ms / 1000.0) as u64;
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_all_usual_spellings() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("512 mib", 512 << 20),
            ("2G", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("10GB", 10_000_000_000),
            ("1t", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_rate("1GiB/s"), Ok(1 << 30));
        assert_eq!(parse_rate(" 100MB/s "), Ok(100_000_000));
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        assert_eq!(parse_size(""), Err(UnitError::NoNumber(String::new())));
        assert_eq!(parse_size("-1"), Err(UnitError::NoNumber("-1".into())));
        assert!(matches!(parse_size("1 parsec"), Err(UnitError::UnknownUnit { .. })));
        assert!(matches!(parse_size("1.2.3"), Err(UnitError::OutOfRange(_))));
        assert!(matches!(parse_size("99999999999999999999"), Err(UnitError::OutOfRange(_))));
        assert!(matches!(parse_size("20000000T"), Err(UnitError::OutOfRange(_))));
        assert!(matches!(parse_duration("5 fortnights"), Err(UnitError::UnknownUnit { .. })));
    }

    #[test]
    fn durations_default_to_milliseconds() {
        assert_eq!(parse_duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("100"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_mins(2)));
    }

    #[test]
    fn output_rounds_to_the_next_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size((1 << 20) - 1), "1.0 MiB");
        assert_eq!(size(u64::MAX), "16384.0 PiB");
        assert_eq!(millis(0.84), "0.8 ms");
        assert_eq!(millis(1340.0), "1.3 s");
        assert_eq!(millis(125_000.0), "2 min 5 s");
    }
}
