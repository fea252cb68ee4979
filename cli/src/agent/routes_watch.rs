//! Calls of those who watch: moves that go on, their events as they happen, metrics.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::broadcast::error::RecvError;

use super::error::ApiError;
use super::http::Shared;
use super::metrics::Now;
use super::routes_vm::ListQuery;
use super::{Agent, hostinfo, peers};
use crate::api::types::{ErrorBody, FORWARDED_HEADER};
use crate::api::watch::{MoveList, WatchedMove};

/// Content type of the metrics (OpenMetrics 1.0).
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Moves that go on or ended moments ago: those led from this host, or from all hosts.
#[utoipa::path(get, path = "/v1/moves", tag = "move", params(ListQuery),
    responses((status = 200, body = MoveList), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn moves(
    State(agent): Shared,
    Query(query): Query<ListQuery>,
    headers: HeaderMap,
) -> axum::Json<MoveList> {
    let mut list = MoveList { moves: agent.watched.moves(), unreachable: Vec::new() };
    if query.all && !headers.contains_key(FORWARDED_HEADER) {
        for (host, theirs) in agent.peers.ask_all::<MoveList>("/v1/moves", peers::SHORT).join_all().await {
            match theirs {
                Ok(theirs) => list.moves.extend(theirs.moves),
                Err(_) => list.unreachable.push(host),
            }
        }
        list.unreachable.sort();
    }
    list.moves.sort_by(|a, b| (&a.vm, a.progress.elapsed_ms).cmp(&(&b.vm, b.progress.elapsed_ms)));
    axum::Json(list)
}

/// What happens to the moves that this host leads, as server-sent events: first all that go on, then every change. An event `move` has a
/// `WatchedMove` as its data; `missed` says how many a slow listener did not get.
#[utoipa::path(get, path = "/v1/events", tag = "move",
    responses((status = 200, body = WatchedMove, content_type = "text/event-stream")))]
pub async fn events(State(agent): Shared) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    // Subscribed before the list is made: an event may come twice, none is missed.
    let listener = agent.watched.subscribe();
    let now = stream::iter(agent.watched.moves().into_iter().map(event).collect::<Vec<_>>());
    let later = stream::unfold(listener, async |mut listener| match listener.recv().await {
        Ok(seen) => Some((event(seen), listener)),
        Err(RecvError::Lagged(missed)) => {
            Some((Event::default().event("missed").data(missed.to_string()), listener))
        }
        Err(RecvError::Closed) => None,
    });
    Sse::new(now.chain(later).map(Ok)).keep_alive(KeepAlive::default())
}

fn event(seen: WatchedMove) -> Event {
    // Plain data always has a JSON form.
    Event::default()
        .event("move")
        .json_data(seen)
        .unwrap_or_else(|_| Event::default().event("missed").data("1"))
}

/// Figures of this host for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "host",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"),
        (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn metrics(State(agent): Shared) -> Result<impl IntoResponse, ApiError> {
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], agent.metrics().await?))
}

impl Agent {
    async fn metrics(self: &Arc<Self>) -> Result<String, ApiError> {
        let vms: Vec<_> = self.list().await?.into_iter().map(|vm| vm.state).collect();
        let now = Now {
            vms: &vms,
            moves: self.watched.going_on(),
            memory_free_bytes: hostinfo::memory()?.available,
            datastores: &self.datastore_infos()?,
        };
        let text = self.watched.metrics.text(&now);
        text.map_err(|e| ApiError::internal(format!("cannot write the metrics: {e}")))
    }
}
