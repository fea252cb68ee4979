//! Join tokens: `vmove1-SECRET-FINGERPRINT`. The secret works once and expires; the fingerprint lets the joining host know that it
//! talks to the right cluster before it says anything.
//!
//! On disk (`<state>/tokens.json`) only a hash of the secret is kept. Never enters: sockets, certificates.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{IdentityError, files::write_private};

/// How long a token works if nobody says otherwise.
pub const DEFAULT_LIFETIME: Duration = Duration::from_hours(1);
/// Most tokens that wait at once; the oldest go first.
const MAX_TOKENS: usize = 64;
const PREFIX: &str = "vmove1";

/// A token as it is handed to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What the first host checks (hex).
    pub secret: String,
    /// BLAKE3 of the authority's certificate (DER), hex.
    pub fingerprint: String,
}

impl Token {
    /// Reads a token as a person gives it.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        const BAD: IdentityError =
            IdentityError::Token("this is no join token; run `vmove token` on the first host for a new one");
        let hex = |s: &str, len: usize| s.len() == len && s.bytes().all(|b| b.is_ascii_hexdigit());
        let mut parts = text.trim().split('-');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(PREFIX), Some(secret), Some(fingerprint), None)
                if hex(secret, 32) && hex(fingerprint, 64) =>
            {
                Ok(Self { secret: secret.to_owned(), fingerprint: fingerprint.to_ascii_lowercase() })
            }
            _ => Err(BAD),
        }
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PREFIX}-{}-{}", self.secret, self.fingerprint)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// BLAKE3 of the secret (hex).
    hash: String,
    /// Seconds since 1970.
    expires: u64,
}

/// The tokens a first host has given out.
#[derive(Debug, Clone)]
pub struct TokenStore {
    path: PathBuf,
}

impl TokenStore {
    /// The store of the host whose state is in `state`.
    pub fn of(state: &Path) -> Self {
        Self { path: state.join("tokens.json") }
    }

    /// Makes a token that works once within `lifetime`.
    pub fn issue(&self, fingerprint: &str, lifetime: Duration) -> Result<Token, IdentityError> {
        self.issue_at(fingerprint, lifetime, SystemTime::now())
    }

    fn issue_at(
        &self,
        fingerprint: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Token, IdentityError> {
        let _lock = self.lock()?;
        let mut stored = self.load()?;
        let secret = uuid::Uuid::new_v4().simple().to_string();
        let expires = seconds(now) + lifetime.as_secs();
        stored.retain(|token| token.expires > seconds(now));
        stored.push(Stored { hash: hash(&secret), expires });
        let surplus = stored.len().saturating_sub(MAX_TOKENS);
        stored.drain(..surplus);
        self.save(&stored)?;
        Ok(Token { secret, fingerprint: fingerprint.to_owned() })
    }

    /// Whether a secret would be accepted; it stays unused.
    pub fn check(&self, secret: &str) -> Result<(), IdentityError> {
        position(&self.load()?, secret, SystemTime::now()).map(|_| ())
    }

    /// Uses a secret up.
    ///
    /// # Errors
    /// When it was never given out, was used before, or is too old; the message does not say which.
    pub fn redeem(&self, secret: &str) -> Result<(), IdentityError> {
        self.redeem_at(secret, SystemTime::now())
    }

    fn redeem_at(&self, secret: &str, now: SystemTime) -> Result<(), IdentityError> {
        let _lock = self.lock()?;
        let mut stored = self.load()?;
        stored.remove(position(&stored, secret, now)?);
        // On disk before anybody is let in: a token must not come back with a crash.
        self.save(&stored)
    }

    /// `vmove token` and the agent may come at the same time.
    fn lock(&self) -> Result<File, IdentityError> {
        let path = self.path.with_extension("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| IdentityError::io("open", &path, e))?;
        file.lock().map_err(|e| IdentityError::io("lock", &path, e))?;
        Ok(file)
    }

    fn load(&self) -> Result<Vec<Stored>, IdentityError> {
        match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| IdentityError::Damaged { path: self.path.clone(), reason: e.to_string() }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(IdentityError::io("read", &self.path, e)),
        }
    }

    fn save(&self, stored: &[Stored]) -> Result<(), IdentityError> {
        let text = serde_json::to_string_pretty(stored)
            .map_err(|e| IdentityError::Damaged { path: self.path.clone(), reason: e.to_string() })?;
        write_private(&self.path, &text)
    }
}

/// Which stored token a secret is, if it still works.
fn position(stored: &[Stored], secret: &str, now: SystemTime) -> Result<usize, IdentityError> {
    let hash = hash(secret);
    stored.iter().position(|token| token.hash == hash && token.expires > seconds(now)).ok_or(
        IdentityError::Token(
            "the join token is not valid: unknown, used before, or expired; run `vmove token` on the first host for a new one",
        ),
    )
}

fn hash(secret: &str) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_not_after_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = TokenStore::of(dir.path());
        let now = SystemTime::now();
        let token = store.issue_at(&"a".repeat(64), Duration::from_mins(1), now).unwrap();
        let late = store.issue_at(&"a".repeat(64), Duration::from_mins(1), now).unwrap();
        assert_eq!(Token::parse(&token.to_string()).unwrap(), token);
        assert!(store.redeem_at("00", now).is_err());
        store.redeem_at(&token.secret, now).unwrap();
        assert!(store.redeem_at(&token.secret, now).is_err(), "used twice");
        assert!(store.redeem_at(&late.secret, now + Duration::from_secs(61)).is_err(), "expired");
        let on_disk = std::fs::read_to_string(dir.path().join("tokens.json")).unwrap();
        assert!(!on_disk.contains(&late.secret), "secrets are not kept");
    }

    #[test]
    fn rubbish_is_no_token() {
        for text in ["", "vmove1", "vmove1-ab-cd", "vmove2-00000000000000000000000000000000-00", "a-b-c-d"] {
            assert!(Token::parse(text).is_err(), "{text:?}");
        }
    }
}
