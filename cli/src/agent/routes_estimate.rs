//! Calls about estimates. Each hands over to the agent at once.

use axum::body::Body;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::ApiError;
use super::http::{Json, Peer, Shared};
use crate::api::estimate::{Estimate, EstimateRequest, ProbeAnswer};
use crate::api::types::ErrorBody;

/// Watch a VM and its way for a few seconds: what would a move take?
#[utoipa::path(post, path = "/v1/vms/{vm}/estimate", tag = "move", request_body = EstimateRequest,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = Estimate), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn estimate(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(request): Json<EstimateRequest>,
) -> Result<axum::Json<Estimate>, ApiError> {
    agent.estimate(&vm, request).await.map(axum::Json)
}

/// Where probed bytes go.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Into {
    /// A datastore of this host; none: nowhere.
    datastore: Option<String>,
}

/// Send bytes, to learn how fast they get here.
#[utoipa::path(post, path = "/v1/probe", tag = "peer", params(Into),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = ProbeAnswer), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn probe(
    State(agent): Shared,
    Peer(_from): Peer,
    Query(into): Query<Into>,
    body: Body,
) -> Result<axum::Json<ProbeAnswer>, ApiError> {
    agent.take_probe(into.datastore.as_deref(), body).await.map(axum::Json)
}
