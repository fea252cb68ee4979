//! Calls about taking a host out of the cluster. Each hands over to the agent at once.

use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::error::{ApiError, to_its_end};
use super::http::{Json, Peer, Shared};
use crate::api::removal::{HostRemoval, HostTies, RemovedHosts};
use crate::api::types::ErrorBody;

/// What it would mean to take a host out of the cluster, and what stands in the way.
#[utoipa::path(get, path = "/v1/hosts/{host}/removal", tag = "host", params(("host" = String, Path, description = "Its name")),
    responses((status = 200, body = HostRemoval), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn removal(
    State(agent): Shared,
    Path(host): Path<String>,
) -> Result<axum::Json<HostRemoval>, ApiError> {
    agent.removal_of(&host).await.map(axum::Json)
}

/// Take a host that is gone for ever out of the cluster. Refused while any host reaches it.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "host", params(("host" = String, Path, description = "Its name")),
    responses((status = 200, body = HostRemoval), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn remove(
    State(agent): Shared,
    Path(host): Path<String>,
) -> Result<axum::Json<HostRemoval>, ApiError> {
    to_its_end(async move { agent.remove_host(&host).await }).await.map(axum::Json)
}

/// What the asked host has to do with another one.
#[utoipa::path(get, path = "/v1/hosts/{host}/ties", tag = "host", params(("host" = String, Path, description = "Its name")),
    responses((status = 200, body = HostTies), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn ties(State(agent): Shared, Path(host): Path<String>) -> Result<axum::Json<HostTies>, ApiError> {
    agent.ties_to(&host).await.map(axum::Json)
}

/// Hosts that were taken out of the cluster.
#[utoipa::path(get, path = "/v1/removed-hosts", tag = "host",
    responses((status = 200, body = RemovedHosts), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn removed(State(agent): Shared) -> axum::Json<RemovedHosts> {
    axum::Json(agent.removed_hosts())
}

/// Tell of hosts that were taken out of the cluster.
#[utoipa::path(put, path = "/v1/removed-hosts", tag = "peer", request_body = RemovedHosts,
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn hear_of_removed(
    State(agent): Shared,
    Peer(from): Peer,
    Json(hosts): Json<RemovedHosts>,
) -> Result<StatusCode, ApiError> {
    agent.hear_of_removed(&from, hosts).await.map(|()| StatusCode::NO_CONTENT)
}
