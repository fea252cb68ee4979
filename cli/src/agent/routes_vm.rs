//! Calls about VMs and their moves. Each hands over to the agent at once.

use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::Agent;
use super::error::{ApiError, to_its_end};
use super::http::{Json, Shared};
use super::peers;
use crate::api::types::{
    CreateVm, ErrorBody, FORWARDED_HEADER, MoveAnswer, MoveProgress, MoveRequest, VmDetail, VmList, VmSummary,
};

/// Options of a list of VMs.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Also those of the other hosts.
    #[serde(default)]
    pub(super) all: bool,
}

/// VMs of this host, or of all hosts.
#[utoipa::path(get, path = "/v1/vms", tag = "vm", params(ListQuery),
    responses((status = 200, body = VmList), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn list(
    State(agent): Shared,
    Query(query): Query<ListQuery>,
    headers: HeaderMap,
) -> Result<axum::Json<VmList>, ApiError> {
    let mut list = VmList { vms: agent.list().await?, unreachable: Vec::new() };
    if query.all && !headers.contains_key(FORWARDED_HEADER) {
        add_others(&agent, &mut list).await;
    }
    Ok(axum::Json(list))
}

async fn add_others(agent: &Arc<Agent>, list: &mut VmList) {
    let asked = agent.peers.ask_all::<VmList>("/v1/vms", peers::SHORT).join_all().await;
    for (host, theirs) in asked {
        match theirs {
            Ok(theirs) => {
                agent.saw(&host, &theirs).await;
                list.vms.extend(theirs.vms);
            }
            Err(_) => list.unreachable.push(host),
        }
    }
    list.vms.sort_by(|a, b| (&a.name, &a.host).cmp(&(&b.name, &b.host)));
    list.unreachable.sort();
}

/// Make a VM on this host.
#[utoipa::path(post, path = "/v1/vms", tag = "vm", request_body = CreateVm,
    responses((status = 201, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn create(
    State(agent): Shared,
    Json(request): Json<CreateVm>,
) -> Result<(StatusCode, axum::Json<VmSummary>), ApiError> {
    Ok((StatusCode::CREATED, axum::Json(agent.create(request).await?)))
}

/// One VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmDetail), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn show(State(agent): Shared, Path(vm): Path<String>) -> Result<axum::Json<VmDetail>, ApiError> {
    Ok(axum::Json(agent.detail(&agent.must_view(&vm).await?)))
}

/// Remove a VM that does not run, with its disks.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn remove(State(agent): Shared, Path(vm): Path<String>) -> Result<StatusCode, ApiError> {
    agent.remove(&vm).await.map(|()| StatusCode::NO_CONTENT)
}

/// Boot a stopped VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn start(State(agent): Shared, Path(vm): Path<String>) -> Result<axum::Json<VmSummary>, ApiError> {
    agent.start(&vm).await.map(axum::Json)
}

/// End a running VM: its disks are flushed, the guest is not asked.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn stop(State(agent): Shared, Path(vm): Path<String>) -> Result<axum::Json<VmSummary>, ApiError> {
    agent.stop(&vm).await.map(axum::Json)
}

/// Press the power button of a running VM. The guest may switch itself off then, or not: its state says so. `busy` means that it
/// stands still for a moment: ask again.
#[utoipa::path(post, path = "/v1/vms/{vm}/power-button", tag = "vm",
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn power_button(State(agent): Shared, Path(vm): Path<String>) -> Result<StatusCode, ApiError> {
    agent.press_power_button(&vm).await.map(|()| StatusCode::NO_CONTENT)
}

/// The serial console: upgrade to `vmove-console`, then the messages of `vmove_compute::process::console::wire` both ways. Wherever
/// a client attaches again after a move, it goes on where it was.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 101, description = "Messages of the console follow"), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn console(
    State(agent): Shared,
    Path(vm): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    agent.console(&vm, request).await
}

/// Move a VM to another host, another datastore, or both; or say what that would do.
#[utoipa::path(post, path = "/v1/vms/{vm}/move", tag = "move", request_body = MoveRequest,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, description = "The plan, or the move that has begun", body = MoveAnswer),
        (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn move_vm(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Result<axum::Json<MoveAnswer>, ApiError> {
    to_its_end(async move { agent.move_vm(&vm, request).await }).await.map(axum::Json)
}

/// How far a move is, or how it ended.
#[utoipa::path(get, path = "/v1/moves/{id}", tag = "move", params(("id" = String, Path, description = "The move's id")),
    responses((status = 200, body = MoveProgress), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn progress(
    State(agent): Shared,
    Path(id): Path<String>,
) -> Result<axum::Json<MoveProgress>, ApiError> {
    let progress = agent.progress(&id).await?;
    progress.map(axum::Json).ok_or_else(|| ApiError::not_found(format!("there is no move {id}")))
}

/// Give a move up that is not committed.
#[utoipa::path(delete, path = "/v1/moves/{id}", tag = "move", params(("id" = String, Path, description = "The move's id")),
    responses((status = 204), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn cancel(State(agent): Shared, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    agent.cancel(&id).await.map(|()| StatusCode::NO_CONTENT)
}
