//! Calls that change what a VM is. Each hands over to the agent at once.

use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::error::ApiError;
use super::http::{Json, Shared};
use crate::api::definitions::{EditVm, NewName};
use crate::api::types::{ErrorBody, VmSummary};

/// Change a stopped VM.
#[utoipa::path(put, path = "/v1/vms/{vm}/definition", tag = "vm", request_body = EditVm,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn edit(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(edit): Json<EditVm>,
) -> Result<axum::Json<VmSummary>, ApiError> {
    agent.edit(&vm, edit).await.map(axum::Json)
}

/// Give a stopped VM another name.
#[utoipa::path(post, path = "/v1/vms/{vm}/rename", tag = "vm", request_body = NewName,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn rename(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(new): Json<NewName>,
) -> Result<axum::Json<VmSummary>, ApiError> {
    // In a task of its own: a caller that hangs up must not leave it half done.
    tokio::spawn(async move { agent.rename(&vm, &new.name).await })
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the agent failed; see its log")))
        .map(axum::Json)
}

/// Copy a stopped VM: own disks and MAC addresses, the same everything else.
#[utoipa::path(post, path = "/v1/vms/{vm}/clone", tag = "vm", request_body = NewName,
    params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 201, body = VmSummary), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn clone_vm(
    State(agent): Shared,
    Path(vm): Path<String>,
    Json(new): Json<NewName>,
) -> Result<(StatusCode, axum::Json<VmSummary>), ApiError> {
    tokio::spawn(async move { agent.clone_vm(&vm, &new.name).await })
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the agent failed; see its log")))
        .map(|vm| (StatusCode::CREATED, axum::Json(vm)))
}
