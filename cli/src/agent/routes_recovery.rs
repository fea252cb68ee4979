//! Calls about what is left after a failure. Each hands over to the agent at once; none is passed on like other calls about a VM, for
//! they are about what the asked host itself holds.

use axum::extract::{Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;
use vmove_mirror::journal::MoveId;

use super::error::{ApiError, to_its_end};
use super::http::Shared;
use crate::api::recovery::{HostStanding, RecoveryReport};
use crate::api::types::ErrorBody;

/// The host on which a person decides.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct OnHost {
    /// Its name.
    host: String,
}

/// Who holds what of a VM, after every host that answers has settled what it can.
#[utoipa::path(post, path = "/v1/vms/{vm}/recover", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = RecoveryReport), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn recover(
    State(agent): Shared,
    Path(vm): Path<String>,
) -> Result<axum::Json<RecoveryReport>, ApiError> {
    agent.recover(&vm).await.map(axum::Json)
}

/// Make a host the owner of a VM without the word of the host at the other end of its move, which is taken to be gone for ever.
#[utoipa::path(post, path = "/v1/vms/{vm}/take-over", tag = "vm",
    params(("vm" = String, Path, description = "The VM's name"), OnHost),
    responses((status = 200, body = HostStanding), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn take_over(
    State(agent): Shared,
    Path(vm): Path<String>,
    Query(on): Query<OnHost>,
) -> Result<axum::Json<HostStanding>, ApiError> {
    to_its_end(async move { agent.take_over(&vm, &on.host).await }).await.map(axum::Json)
}

/// Remove the images that a host kept of a VM that another one took over.
#[utoipa::path(post, path = "/v1/vms/{vm}/discard-lost", tag = "vm",
    params(("vm" = String, Path, description = "The VM's name"), OnHost),
    responses((status = 200, body = HostStanding), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn discard_lost(
    State(agent): Shared,
    Path(vm): Path<String>,
    Query(on): Query<OnHost>,
) -> Result<axum::Json<HostStanding>, ApiError> {
    agent.discard_lost(&vm, &on.host).await.map(axum::Json)
}

/// The move because of which it is asked what a host holds.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ByMove {
    /// Its id: a host that took the VM over by it says so for ever.
    #[serde(default)]
    move_id: Option<String>,
}

/// What the asked host holds of a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}/standing", tag = "vm",
    params(("vm" = String, Path, description = "The VM's name"), ByMove),
    responses((status = 200, body = HostStanding), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn standing(
    State(agent): Shared,
    Path(vm): Path<String>,
    Query(by): Query<ByMove>,
) -> Result<axum::Json<HostStanding>, ApiError> {
    let asked = by.move_id.map(MoveId::new).transpose().map_err(|e| ApiError::invalid(e.to_string()))?;
    agent.standing(&vm, asked).await.map(axum::Json)
}

/// Settle what can be settled of a VM on the asked host, now; then what it holds.
#[utoipa::path(post, path = "/v1/vms/{vm}/settle", tag = "vm", params(("vm" = String, Path, description = "The VM's name")),
    responses((status = 200, body = HostStanding), (status = "default", description = "Why not", body = ErrorBody)))]
pub async fn settle(
    State(agent): Shared,
    Path(vm): Path<String>,
) -> Result<axum::Json<HostStanding>, ApiError> {
    to_its_end(async move { agent.settle_now(&vm).await }).await.map(axum::Json)
}
