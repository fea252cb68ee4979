//! Calls about checkpoints. Each hands over to the agent at once.

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use hyper::Method;
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::{ApiError, blocking};
use super::http::{Json, Peer, Shared};
use super::peers;
use crate::api::checkpoint::{CheckpointBegun, CheckpointList, RestoreCheckpoint, TakeCheckpoint};
use crate::api::types::{ErrorBody, FORWARDED_HEADER, VmSummary};

/// Which checkpoints are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only this VM's.
    vm: Option<String>,
    /// Also those on other hosts.
    #[serde(default)]
    all: bool,
}

/// Take a checkpoint of a running VM; follow it with `GET /v1/moves/{id}`.
#[utoipa::path(post, path = "/v1/vms/{vm}/checkpoints", tag = "checkpoint", request_body = TakeCheckpoint,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = CheckpointBegun), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn take(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(request): Json<TakeCheckpoint>,
) -> Result<axum::Json<CheckpointBegun>, ApiError> {
    // In a task of its own: a caller that hangs up must not leave half a checkpoint behind.
    tokio::spawn(async move { agent.take_checkpoint(&vm, request).await })
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the agent failed; see its log")))
        .map(axum::Json)
}

/// Checkpoints of this host, or of all hosts.
#[utoipa::path(get, path = "/v1/checkpoints", tag = "checkpoint", params(ListQuery),
    responses((status = 200, body = CheckpointList), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn list(
    State(agent): Shared,
    Query(query): Query<ListQuery>,
    headers: HeaderMap,
) -> Result<axum::Json<CheckpointList>, ApiError> {
    let wanted = query.vm;
    if let Some(vm) = &wanted {
        vmove_storage::datastore::check_name("VM", vm)?;
    }
    let (asked, vm) = (agent.clone(), wanted.clone());
    let own = blocking(move || asked.checkpoints(vm.as_deref())).await?;
    let mut list = CheckpointList { checkpoints: own, unreachable: Vec::new() };
    if query.all && !headers.contains_key(FORWARDED_HEADER) {
        let only = wanted.map_or_else(String::new, |vm| format!("?vm={vm}"));
        let path = format!("/v1/checkpoints{only}");
        for (host, theirs) in agent.peers.ask_all::<CheckpointList>(&path, peers::SHORT).join_all().await {
            match theirs {
                Ok(theirs) => list.checkpoints.extend(theirs.checkpoints),
                Err(_) => list.unreachable.push(host),
            }
        }
        list.checkpoints.sort_by(|a, b| (&a.vm, a.taken_at, &a.host).cmp(&(&b.vm, b.taken_at, &b.host)));
        list.unreachable.sort();
    }
    Ok(axum::Json(list))
}

/// Remove a checkpoint, wherever it is.
#[utoipa::path(delete, path = "/v1/checkpoints/{vm}/{name}", tag = "checkpoint",
    params(("vm" = String, Path, description = "The VM's name"), ("name" = String, Path, description = "The checkpoint's name")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn remove(
    State(agent): Shared,
    Path((vm, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let (asked, of, which) = (agent.clone(), vm.clone(), name.clone());
    if blocking(move || asked.remove_checkpoint(&of, &which)).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let missing = || {
        ApiError::not_found(format!("there is no checkpoint {name:?} of VM {vm:?} on a host that answers"))
    };
    if headers.contains_key(FORWARDED_HEADER) {
        return Err(missing());
    }
    let host = agent.find_holder(&vm, &name).await.ok_or_else(missing)?;
    let path = format!("/v1/checkpoints/{vm}/{name}");
    let () = agent.peers.call(&host, Method::DELETE, &path, None::<&()>, peers::LONG).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Go on from a checkpoint. Answered when the guest runs.
#[utoipa::path(post, path = "/v1/checkpoints/{vm}/{name}/restore", tag = "checkpoint", request_body = RestoreCheckpoint,
    params(("vm" = String, Path, description = "The VM's name"), ("name" = String, Path, description = "The checkpoint's name")),
    responses((status = 200, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn restore(
    State(agent): Shared,
    Path((vm, name)): Path<(String, String)>,
    Json(request): Json<RestoreCheckpoint>,
) -> Result<axum::Json<VmSummary>, ApiError> {
    // In a task of its own: a caller that hangs up must not leave half a VM behind.
    tokio::spawn(async move { agent.restore(&vm, &name, request).await })
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the agent failed; see its log")))
        .map(axum::Json)
}

/// One file of a checkpoint: the first one (`checkpoint`) whole, of the others the chunks that hold data, in order.
#[utoipa::path(get, path = "/v1/checkpoints/{vm}/{name}/files/{file}", tag = "peer",
    params(("vm" = String, Path, description = "The VM's name"), ("name" = String, Path, description = "The checkpoint's name"),
        ("file" = String, Path, description = "The file's name")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>),
        (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn file(
    State(agent): Shared,
    Peer(_from): Peer,
    Path((vm, name, file)): Path<(String, String, String)>,
) -> Result<Body, ApiError> {
    agent.checkpoint_file(&vm, &name, &file).await
}
