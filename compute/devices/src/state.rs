//! Saved state as named, versioned sections, strict on the way in.
//!
//! A section is a name, a version and bytes (postcard). Restoring takes each section by name and version; an
//! unknown version, trailing bytes, a duplicate name or a section nobody took are errors, so that two builds that
//! disagree about the state of a machine find out before the guest runs. The bytes are untrusted input.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most sections one machine's state may hold.
pub const MAX_SECTIONS: usize = 4096;
/// Longest name of a section, in bytes.
pub const MAX_NAME_BYTES: usize = 96;
/// Most bytes in all sections together.
pub const MAX_TOTAL_BYTES: usize = 64 << 20;

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A value could not be written.
    #[error("cannot encode section {name:?}: {source}")]
    Encode {
        /// The section.
        name: String,
        /// The encoder's answer.
        source: postcard::Error,
    },
    /// The bytes are no list of sections.
    #[error("no list of sections: {0}")]
    Malformed(postcard::Error),
    /// The list of sections ends before the bytes do.
    #[error("{0} bytes left over after the last section")]
    LeftOverBytes(usize),
    /// The bytes are not a value of the expected type.
    #[error("cannot decode section {name:?} version {version}: {source}")]
    Decode {
        /// The section.
        name: String,
        /// Its version.
        version: u16,
        /// The decoder's answer.
        source: postcard::Error,
    },
    /// The value ends before the bytes do.
    #[error("section {name:?} version {version} has {bytes} bytes too many")]
    Trailing {
        /// The section.
        name: String,
        /// Its version.
        version: u16,
        /// How many bytes were left.
        bytes: usize,
    },
    /// This build reads another version.
    #[error("section {name:?} has version {found}, this build reads version {wanted}")]
    Version {
        /// The section.
        name: String,
        /// The version in the state.
        found: u16,
        /// The version this build knows.
        wanted: u16,
    },
    /// A section that must be there is not.
    #[error("section {0:?} is missing")]
    Missing(String),
    /// Two sections have the same name.
    #[error("section {0:?} is there twice")]
    Duplicate(String),
    /// Nothing in this machine took these sections.
    #[error("sections nobody knows: {0:?}")]
    LeftOver(Vec<String>),
    /// A count, a length or a name is beyond what any machine of ours writes.
    #[error("the saved state has {what}: {value}, at most {limit} are allowed")]
    TooLarge {
        /// What was counted.
        what: &'static str,
        /// How much was found.
        value: usize,
        /// How much is allowed.
        limit: usize,
    },
}

/// A named, versioned piece of saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Unique in a machine, such as `pci/disk0`.
    pub name: String,
    /// Raised whenever the meaning of `bytes` changes.
    pub version: u16,
    /// The postcard encoding of a plain struct.
    pub bytes: Vec<u8>,
}

impl Section {
    /// Writes `value` as the section `name`.
    pub fn encode<T: Serialize>(
        name: impl Into<String>,
        version: u16,
        value: &T,
    ) -> Result<Self, StateError> {
        let name = name.into();
        match postcard::to_stdvec(value) {
            Ok(bytes) => Ok(Self { name, version, bytes }),
            Err(source) => Err(StateError::Encode { name, source }),
        }
    }

    /// Reads the value back. Every byte must be used and the version must be `version`.
    pub fn decode<T: DeserializeOwned>(&self, version: u16) -> Result<T, StateError> {
        if self.version != version {
            return Err(StateError::Version {
                name: self.name.clone(),
                found: self.version,
                wanted: version,
            });
        }
        let (value, rest) = postcard::take_from_bytes(&self.bytes).map_err(|source| StateError::Decode {
            name: self.name.clone(),
            version,
            source,
        })?;
        if !rest.is_empty() {
            return Err(StateError::Trailing { name: self.name.clone(), version, bytes: rest.len() });
        }
        Ok(value)
    }
}

/// Reads the list of a machine's sections (postcard), every byte of it.
pub fn decode(bytes: &[u8]) -> Result<Vec<Section>, StateError> {
    match postcard::take_from_bytes(bytes) {
        Ok((sections, [])) => Ok(sections),
        Ok((_, rest)) => Err(StateError::LeftOverBytes(rest.len())),
        Err(error) => Err(StateError::Malformed(error)),
    }
}

/// The sections of one machine on their way in: each is taken once, and [`finish`](Self::finish) proves that none
/// is left.
#[derive(Debug, Default)]
pub struct Sections {
    left: BTreeMap<String, Section>,
}

impl Sections {
    /// Checks the caps of this module and that no name occurs twice.
    pub fn new(sections: Vec<Section>) -> Result<Self, StateError> {
        let within = |what, value, limit| {
            if value > limit { Err(StateError::TooLarge { what, value, limit }) } else { Ok(()) }
        };
        within("sections", sections.len(), MAX_SECTIONS)?;
        within("bytes", sections.iter().map(|s| s.bytes.len()).sum(), MAX_TOTAL_BYTES)?;
        let mut left = BTreeMap::new();
        for section in sections {
            within("bytes in a section's name", section.name.len(), MAX_NAME_BYTES)?;
            let name = section.name.clone();
            if left.insert(name.clone(), section).is_some() {
                return Err(StateError::Duplicate(name));
            }
        }
        Ok(Self { left })
    }

    /// Takes the section `name`, which must be there in `version`, and decodes it.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, version: u16) -> Result<T, StateError> {
        self.left.remove(name).ok_or_else(|| StateError::Missing(name.to_owned()))?.decode(version)
    }

    /// Whether a section `name` is there and was not taken yet.
    pub fn contains(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// Fails if any section was not taken.
    pub fn finish(self) -> Result<(), StateError> {
        if self.left.is_empty() { Ok(()) } else { Err(StateError::LeftOver(self.left.into_keys().collect())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str) -> Section {
        Section::encode(name, 3, &(7u32, "x".to_owned())).unwrap()
    }

    #[test]
    fn round_trip() {
        let mut all = Sections::new(vec![section("a"), section("b")]).unwrap();
        assert_eq!(all.take::<(u32, String)>("a", 3).unwrap(), (7, "x".to_owned()));
        assert!(all.contains("b"));
        assert!(matches!(all.finish(), Err(StateError::LeftOver(names)) if names == ["b"]));
    }

    #[test]
    fn strict_about_versions_duplicates_and_trailing_bytes() {
        assert!(matches!(
            section("a").decode::<(u32, String)>(4),
            Err(StateError::Version { found: 3, wanted: 4, .. })
        ));
        assert!(matches!(Sections::new(vec![section("a"), section("a")]), Err(StateError::Duplicate(_))));
        let mut long = section("a");
        long.bytes.push(0);
        assert!(matches!(long.decode::<(u32, String)>(3), Err(StateError::Trailing { bytes: 1, .. })));
        let mut none = Sections::default();
        assert!(matches!(none.take::<u8>("a", 1), Err(StateError::Missing(_))));
        assert!(none.finish().is_ok());
    }

    #[test]
    fn caps_hold() {
        assert!(matches!(
            Sections::new(vec![section(&"n".repeat(MAX_NAME_BYTES + 1))]),
            Err(StateError::TooLarge { .. })
        ));
        let huge_claim = Section { name: "v".into(), version: 1, bytes: vec![0xff, 0xff, 0xff, 0xff, 0x0f] };
        assert!(matches!(huge_claim.decode::<Vec<u64>>(1), Err(StateError::Decode { .. })));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Section { name: "r".into(), version: 1, bytes }
                .decode::<(Vec<u64>, Option<String>, Vec<(u16, Vec<u8>)>)>(1);
        }
    }
}
