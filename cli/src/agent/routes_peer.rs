//! Calls between agents. Each hands over to the agent at once, with the name of the host that calls.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::error::{ApiError, blocking, to_its_end};
use super::http::{Json, Peer, Shared};
use super::incoming::VmFile;
use crate::api::types::{ErrorBody, HostAddress, Listening, Offer, OfferAccepted, VerdictAnswer};

/// Tell of a host.
#[utoipa::path(put, path = "/v1/hosts", tag = "peer", request_body = HostAddress,
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn hear_of(
    State(agent): Shared,
    Peer(from): Peer,
    Json(host): Json<HostAddress>,
) -> Result<StatusCode, ApiError> {
    blocking(move || agent.hear_of(&from, &host)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Offer a VM: accepted, or everything that stands in the way.
#[utoipa::path(post, path = "/v1/incoming", tag = "peer", request_body = Offer,
    responses((status = 200, body = OfferAccepted), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn offer(
    State(agent): Shared,
    Peer(from): Peer,
    Json(offer): Json<Offer>,
) -> Result<axum::Json<OfferAccepted>, ApiError> {
    to_its_end(async move { agent.receive_offer(&from, offer).await }).await.map(axum::Json)
}

/// Send the VM's kernel or initrd, as offered.
#[utoipa::path(put, path = "/v1/incoming/{move_id}/files/{file}", tag = "peer",
    params(("move_id" = String, Path, description = "The move's id"), ("file" = String, Path, description = "`kernel` or `initrd`")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn file(
    State(agent): Shared,
    Peer(from): Peer,
    Path((move_id, file)): Path<(String, String)>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let file = VmFile::parse(&file)?;
    agent.receive_file(&from, &move_id, file, body).await.map(|()| StatusCode::NO_CONTENT)
}

/// Start the process that awaits the source.
#[utoipa::path(post, path = "/v1/incoming/{move_id}/start", tag = "peer",
    params(("move_id" = String, Path, description = "The move's id")),
    responses((status = 200, body = Listening), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn start(
    State(agent): Shared,
    Peer(from): Peer,
    Path(move_id): Path<String>,
) -> Result<axum::Json<Listening>, ApiError> {
    to_its_end(async move { agent.start_incoming(&from, &move_id).await }).await.map(axum::Json)
}

/// Take back what a move made here, unless only the source's word can decide on it.
#[utoipa::path(delete, path = "/v1/incoming/{move_id}", tag = "peer",
    params(("move_id" = String, Path, description = "The move's id")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn discard(
    State(agent): Shared,
    Peer(from): Peer,
    Path(move_id): Path<String>,
) -> Result<StatusCode, ApiError> {
    agent.discard_incoming(&from, &move_id).await.map(|()| StatusCode::NO_CONTENT)
}

/// Which way did this move go? `aborted` is on this host's disk before it is said.
#[utoipa::path(get, path = "/v1/vms/{vm}/moves/{id}/verdict", tag = "peer",
    params(("vm" = String, Path, description = "The VM's name"), ("id" = String, Path, description = "The move's id")),
    responses((status = 200, body = VerdictAnswer), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn verdict(
    State(agent): Shared,
    Peer(from): Peer,
    Path((vm, id)): Path<(String, String)>,
) -> Result<axum::Json<VerdictAnswer>, ApiError> {
    let verdict = agent.verdict(&from, &vm, &id).await?;
    Ok(axum::Json(VerdictAnswer { verdict }))
}
