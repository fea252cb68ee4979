//! Ethernet addresses as people write them.
//!
//! What never enters: where they come from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The MAC address of a guest's interface: a unicast address, six octets in hexadecimal with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress([u8; 6]);

/// Why a text or six octets are no address for an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMac {
    /// Not six octets in hexadecimal.
    #[error("{0:?} is no MAC address (six octets, as in 52:54:00:12:34:56)")]
    Form(String),
    /// A multicast or broadcast address names no interface (IEEE 802, the first octet's lowest bit).
    #[error("{0} is a multicast address; an interface needs a unicast one")]
    Multicast(String),
    /// All zero.
    #[error("{0} is the address of nobody")]
    Zero(String),
}

impl MacAddress {
    /// Checks that the octets can be an interface's.
    pub fn new(octets: [u8; 6]) -> Result<Self, BadMac> {
        let this = Self(octets);
        match octets {
            [0, 0, 0, 0, 0, 0] => Err(BadMac::Zero(this.to_string())),
            [first, ..] if first & 1 == 1 => Err(BadMac::Multicast(this.to_string())),
            _ => Ok(this),
        }
    }

    /// A locally administered unicast address (IEEE 802, the first octet's second bit) out of random octets.
    pub fn local(random: [u8; 6]) -> Self {
        let mut octets = random;
        octets[0] = octets[0] & 0xfc | 2;
        Self(octets)
    }

    /// Its octets, in the order they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let octet = |word: &str| match word.as_bytes() {
            [high, low] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                u8::from_str_radix(word, 16).ok()
            }
            _ => None,
        };
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        match octets.and_then(|octets| octets.try_into().ok()) {
            Some(octets) => Self::new(octets),
            None => Err(BadMac::Form(text.chars().take(32).collect())),
        }
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_others_are_refused() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
        for (text, word) in [
            ("", "no MAC"),
            ("52:54:00:12:34", "no MAC"),
            ("52:54:00:12:34:56:78", "no MAC"),
            ("52:54:00:12:34:5", "no MAC"),
            ("52:54:00:12:34:+5", "no MAC"),
            ("52-54-00-12-34-56", "no MAC"),
            ("01:00:5e:00:00:01", "multicast"),
            ("ff:ff:ff:ff:ff:ff", "multicast"),
            ("00:00:00:00:00:00", "nobody"),
        ] {
            let error = text.parse::<MacAddress>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn made_addresses_are_local_and_unicast() {
        for first in 0..=255 {
            let mac = MacAddress::local([first, 1, 2, 3, 4, 5]);
            assert_eq!(mac.octets()[0] & 3, 2);
            assert_eq!(MacAddress::new(mac.octets()), Ok(mac));
        }
    }
}
