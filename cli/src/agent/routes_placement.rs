//! Calls for the placement of VMs. Each hands over to the agent at once.

use axum::extract::{Path, State};

use super::error::ApiError;
use super::http::{Json, Shared};
use crate::api::placement::{ClusterInventory, HostInventory, Maintenance, MaintenanceRequest};
use crate::api::types::ErrorBody;

/// What this host has and carries.
#[utoipa::path(get, path = "/v1/inventory", tag = "host",
    responses((status = 200, body = HostInventory), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn inventory(State(agent): Shared) -> Result<axum::Json<HostInventory>, ApiError> {
    agent.inventory().await.map(axum::Json)
}

/// What all hosts have and carry.
#[utoipa::path(get, path = "/v1/cluster/inventory", tag = "host",
    responses((status = 200, body = ClusterInventory), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn cluster_inventory(State(agent): Shared) -> Result<axum::Json<ClusterInventory>, ApiError> {
    agent.cluster_inventory().await.map(axum::Json)
}

/// Switch maintenance of a host on or off; a request for another host is passed to its agent.
#[utoipa::path(put, path = "/v1/hosts/{host}/maintenance", tag = "host", request_body = MaintenanceRequest,
    params(("host" = String, Path, description = "The host's name")),
    responses((status = 200, body = Maintenance), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn maintenance(
    State(agent): Shared,
    Path(host): Path<String>,
    Json(request): Json<MaintenanceRequest>,
) -> Result<axum::Json<Maintenance>, ApiError> {
    agent.set_maintenance(&host, request).await.map(axum::Json)
}
