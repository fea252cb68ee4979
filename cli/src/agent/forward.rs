//! Requests for a VM or a move that is elsewhere: passed to the agent that has it, once, never further.
//!
//! Lives here: finding the other agent and passing the request on, console connections included. Never enters: what is asked.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, HOST};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::error::ApiError;
use super::{Agent, console};
use crate::api::types::{FORWARDED_HEADER, MoveProgress, VmDetail, VmState};

impl Agent {
    /// The other host that has a VM (not one it only arrives at), if any that answers does.
    pub async fn find_owner(&self, vm: &str) -> Option<String> {
        let owns = |there: &VmDetail| is_owner(there.summary.state);
        self.peers.find(&format!("/v1/vms/{vm}"), owns).await
    }

    async fn find_move(&self, move_id: &str) -> Option<String> {
        self.peers.find(&format!("/v1/moves/{move_id}"), |_: &MoveProgress| true).await
    }
}

/// Whether a host that has a VM in this state is the one to ask about it.
fn is_owner(state: VmState) -> bool {
    !matches!(state, VmState::Incoming | VmState::Undecided | VmState::Lost)
}

/// The path's segment behind `/v1/vms/` or `/v1/moves/`.
fn subject(request: &Request) -> String {
    request.uri().path().split('/').nth(3).unwrap_or_default().to_owned()
}

fn forwarded(request: &Request) -> bool {
    request.headers().contains_key(FORWARDED_HEADER)
}

/// For routes of one VM.
pub async fn vm_elsewhere(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    let name = subject(&request);
    if forwarded(&request) || vmove_storage::datastore::check_name("VM", &name).is_err() {
        return next.run(request).await;
    }
    let here = match agent.view(&name).await {
        Ok(Some(view)) => is_owner(view.state),
        Ok(None) => false,
        Err(_) => true,
    };
    if here {
        return next.run(request).await;
    }
    match agent.find_owner(&name).await {
        Some(host) => pass_on(&agent, &host, request).await.unwrap_or_else(IntoResponse::into_response),
        None => next.run(request).await,
    }
}

/// For routes of one move.
pub async fn move_elsewhere(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    let id = subject(&request);
    let known = vmove_mirror::journal::MoveId::new(id.clone()).is_ok();
    if forwarded(&request) || !known || matches!(agent.progress(&id).await, Ok(Some(_)) | Err(_)) {
        return next.run(request).await;
    }
    match agent.find_move(&id).await {
        Some(host) => pass_on(&agent, &host, request).await.unwrap_or_else(IntoResponse::into_response),
        None => next.run(request).await,
    }
}

/// Sends a request to another agent as it is, marked, and gives its answer.
async fn pass_on(agent: &Agent, host: &str, mut request: Request) -> Result<Response, ApiError> {
    let bad = |e: &dyn std::fmt::Display| ApiError::internal(format!("cannot pass a request on: {e}"));
    let own = HeaderValue::from_str(agent.name()).map_err(|e| bad(&e))?;
    let there = HeaderValue::from_str(host).map_err(|e| bad(&e))?;
    let upgrading = console::wants_upgrade(&request);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers_mut();
    headers.insert(FORWARDED_HEADER, own);
    headers.insert(HOST, there);
    if !upgrading {
        headers.remove(CONNECTION);
    }
    let what = format!("{} {} on host {host}", request.method(), request.uri().path());
    let mut sender = agent.peers.connect(host).await?;
    let response =
        sender.send_request(request).await.map_err(|e| ApiError::unreachable(format!("{what}: {e}")))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let upgrade = upgrade.ok_or_else(|| ApiError::invalid("this connection cannot be upgraded"))?;
        let other =
            hyper::upgrade::on(response).await.map_err(|e| ApiError::unreachable(format!("{what}: {e}")))?;
        console::bridge(upgrade, TokioIo::new(other));
        return console::switching();
    }
    Ok(response.map(Body::new).into_response())
}
