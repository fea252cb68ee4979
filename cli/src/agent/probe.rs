//! How fast bytes get to another host, into nothing or into one of its datastores; and into a datastore of this host.
//!
//! Lives here: sending and swallowing them, within limits of bytes, time and number. Never enters: what is made of the figures.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use hyper::Method;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use vmove_storage::Datastore;

use super::Agent;
use super::error::ApiError;
use super::peers;
use crate::api::estimate::ProbeAnswer;

/// Bytes sent at once.
const CHUNK: usize = 256 << 10;
/// Most bytes of one probe.
const MAX_BYTES: u64 = 1 << 30;
/// Of what is free in a datastore, a probe takes at most one part of this many: running guests need the rest.
const SHARE: u64 = 8;
/// How long a probe goes on at most.
const TIME: Duration = Duration::from_millis(700);
/// Short calls made to learn the round trip; the quickest counts.
const TURNS: usize = 5;
/// Longest that a probe is taken in from another host.
const PATIENCE: Duration = Duration::from_secs(10);

impl Agent {
    /// Bytes a second to another host, into one of its datastores if one is named.
    pub(super) async fn probe_peer(&self, host: &str, datastore: Option<&str>) -> Result<u64, ApiError> {
        let path = match datastore {
            Some(name) => format!("/v1/probe?datastore={name}"),
            None => "/v1/probe".to_owned(),
        };
        // Not zeroes: whatever compresses on the way must not flatter it.
        let chunk = Bytes::from(noise());
        let end = Instant::now() + TIME;
        let chunks = stream::iter(0..MAX_BYTES / CHUNK as u64)
            .take_while(move |_| std::future::ready(Instant::now() < end))
            .map(move |_| Ok::<_, std::convert::Infallible>(chunk.clone()));
        let answer: ProbeAnswer =
            self.peers.send(host, Method::POST, &path, Body::from_stream(chunks), peers::LONG).await?;
        Ok(rate(answer))
    }

    /// A message to another host and its answer.
    pub(super) async fn round_trip(&self, host: &str) -> Result<Duration, ApiError> {
        let mut sender = self.peers.connect(host).await?;
        let mut best = Duration::MAX;
        for _ in 0..TURNS {
            let request = hyper::Request::builder()
                .method(Method::POST)
                .uri("/v1/probe")
                .header(hyper::header::HOST, host)
                .body(Body::empty())
                .map_err(|e| ApiError::internal(format!("probe of host {host}: {e}")))?;
            let began = Instant::now();
            let turn = async {
                let response = sender.send_request(request).await?;
                response.into_body().collect().await
            };
            tokio::time::timeout(peers::SHORT, turn)
                .await
                .map_err(|_| ApiError::unreachable(format!("host {host} does not answer a probe")))?
                .map_err(|e| ApiError::unreachable(format!("host {host} does not answer a probe: {e}")))?;
            best = best.min(began.elapsed());
        }
        Ok(best)
    }

    /// Bytes a second into a datastore of this host.
    pub(super) async fn probe_store(&self, datastore: &str) -> Result<u64, ApiError> {
        let mut sink = Sink::open(&self.store(datastore)?).await?;
        let chunk = noise();
        let began = Instant::now();
        while began.elapsed() < TIME && sink.bytes < MAX_BYTES {
            sink.write(&chunk).await?;
        }
        sink.finish().await?;
        Ok(rate(ProbeAnswer { bytes: sink.bytes, elapsed_us: began.elapsed().as_micros() as u64 }))
    }

    /// Swallows what another agent sends; one probe at a time.
    pub(super) async fn take_probe(
        &self,
        datastore: Option<&str>,
        body: Body,
    ) -> Result<ProbeAnswer, ApiError> {
        let _alone = self
            .probing
            .try_lock()
            .map_err(|_| ApiError::busy("another probe is going on at this host; try again in a second"))?;
        let mut sink = match datastore {
            Some(name) => Some(Sink::open(&self.store(name)?).await?),
            None => None,
        };
        let swallow = async {
            let (mut body, mut bytes) = (body.into_data_stream(), 0);
            let began = Instant::now();
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|e| ApiError::invalid(format!("the probe broke off: {e}")))?;
                bytes += chunk.len() as u64;
                if bytes > MAX_BYTES {
                    return Err(ApiError::too_large(format!("a probe has at most {MAX_BYTES} bytes")));
                }
                if let Some(sink) = &mut sink {
                    sink.write(&chunk).await?;
                }
            }
            if let Some(sink) = &mut sink {
                sink.finish().await?;
            }
            Ok(ProbeAnswer { bytes, elapsed_us: began.elapsed().as_micros() as u64 })
        };
        tokio::time::timeout(PATIENCE, swallow)
            .await
            .unwrap_or_else(|_| Err(ApiError::invalid("the probe did not come to an end")))
    }
}

fn rate(answer: ProbeAnswer) -> u64 {
    (u128::from(answer.bytes) * 1_000_000 / u128::from(answer.elapsed_us.max(1))) as u64
}

fn noise() -> Vec<u8> {
    let mut bytes = vec![0; CHUNK];
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"probe");
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A file without a name in a datastore: it goes with its descriptor, whatever happens.
struct Sink {
    file: File,
    dir: PathBuf,
    /// Bytes written in all.
    bytes: u64,
    /// Bytes after which it begins again at its start.
    room: u64,
}

impl Sink {
    async fn open(store: &Datastore) -> Result<Self, ApiError> {
        let (dir, room) = (store.path(), (store.free_bytes()? / SHARE).max(CHUNK as u64));
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(nix::libc::O_TMPFILE);
        let file = options.open(dir).await.map_err(|e| ApiError::io("write a probe in", dir, &e))?;
        Ok(Self { file, dir: dir.to_owned(), bytes: 0, room })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let after = self.bytes + bytes.len() as u64;
        if self.bytes / self.room != after / self.room {
            self.file.rewind().await.map_err(|e| ApiError::io("write a probe in", &self.dir, &e))?;
        }
        self.bytes = after;
        self.file.write_all(bytes).await.map_err(|e| ApiError::io("write a probe in", &self.dir, &e))
    }

    async fn finish(&mut self) -> Result<(), ApiError> {
        let synced = async {
            self.file.flush().await?;
            self.file.sync_data().await
        };
        synced.await.map_err(|e| ApiError::io("sync a probe in", &self.dir, &e))
    }
}
