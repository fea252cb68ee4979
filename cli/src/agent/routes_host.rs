//! Calls about hosts, and the API's own document. Each hands over to the agent at once.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::{ApiError, blocking};
use super::http::{Json, Shared, openapi};
use crate::api::datastores::AddDatastore;
use crate::api::types::{DatastoreInfo, ErrorBody, HostInfo, JoinAnswer, JoinRequest, KnownHost};

/// Options of a list of hosts.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct HostsQuery {
    /// Ask each host whether it is there (default).
    #[serde(default = "yes")]
    probe: bool,
}

fn yes() -> bool {
    true
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "host",
    responses((status = 200, description = "The OpenAPI document of this API", content_type = "application/json", body = serde_json::Value)))]
pub async fn openapi_document() -> Result<Response, ApiError> {
    Ok(([(CONTENT_TYPE, "application/json")], openapi()?).into_response())
}

/// What this host is and has.
#[utoipa::path(get, path = "/v1/host", tag = "host",
    responses((status = 200, body = HostInfo), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn host(State(agent): Shared) -> Result<axum::Json<HostInfo>, ApiError> {
    blocking(move || agent.host_info()).await.map(axum::Json)
}

/// This host and those it knows, asked concurrently with a short deadline.
#[utoipa::path(get, path = "/v1/hosts", tag = "host", params(HostsQuery),
    responses((status = 200, body = Vec<KnownHost>), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn hosts(
    State(agent): Shared,
    Query(query): Query<HostsQuery>,
) -> Result<axum::Json<Vec<KnownHost>>, ApiError> {
    agent.known_hosts(query.probe).await.map(axum::Json)
}

/// Become one of the cluster, with a one-time token. The only call that needs no certificate.
#[utoipa::path(post, path = "/v1/join", tag = "host", request_body = JoinRequest,
    responses((status = 200, body = JoinAnswer), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn join(
    State(agent): Shared,
    Json(request): Json<JoinRequest>,
) -> Result<axum::Json<JoinAnswer>, ApiError> {
    agent.admit(request).await.map(axum::Json)
}

/// Make a directory of this host one of its datastores, now and for every later start of the agent.
#[utoipa::path(post, path = "/v1/datastores", tag = "host", request_body = AddDatastore,
    responses((status = 201, body = DatastoreInfo), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn add_datastore(
    State(agent): Shared,
    Json(add): Json<AddDatastore>,
) -> Result<(StatusCode, axum::Json<DatastoreInfo>), ApiError> {
    let info = blocking(move || agent.add_datastore(&add)).await?;
    Ok((StatusCode::CREATED, axum::Json(info)))
}

/// Forget a datastore that no VM uses; what lies in its directory stays.
#[utoipa::path(delete, path = "/v1/datastores/{name}", tag = "host",
    params(("name" = String, Path, description = "The datastore's name")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn remove_datastore(
    State(agent): Shared,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    blocking(move || agent.remove_datastore(&name)).await.map(|()| StatusCode::NO_CONTENT)
}
