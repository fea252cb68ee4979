//! The API's router: who may call what, what is passed on, and the document made from the routes.
//!
//! Lives here: routes, extractors, serving until the agent ends. Never enters: what the calls do (`routes_*` hand over at once).

use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::ApiError;
use super::listener::{Caller, TlsListener, listen_unix};
use super::{
    Agent, AgentError, forward, routes_checkpoint, routes_definition, routes_estimate, routes_host,
    routes_peer, routes_placement, routes_recovery, routes_removal, routes_vm, routes_watch,
};

/// The document's head.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmove agent",
        description = "The per-host agent of vmove: VMs of this host, moves between hosts and datastores. Served on a unix socket (`/run/vmove/agent.sock`) and, for other agents, over TLS 1.3 with mutual certificates. Errors are JSON: `{\"error\": {\"code\", \"message\", \"blockers\"}}`.",
        license(name = "Apache-2.0 OR MIT", identifier = "Apache-2.0 OR MIT")
    ),
    tags(
        (name = "host", description = "This host and those it knows"),
        (name = "vm", description = "VMs; a request for a VM on another host is passed to its agent"),
        (name = "move", description = "Moves"),
        (name = "checkpoint", description = "Checkpoints of VMs"),
        (name = "peer", description = "Only for other agents of the cluster")
    )
)]
struct Document;

/// The other agent that calls; refuses everybody else.
#[derive(Debug)]
pub struct Peer(
    /// Its host's name.
    pub String,
);

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        match caller(parts.extensions.get()) {
            Caller::Host(name) => Ok(Self(name)),
            _ => Err(ApiError::forbidden(
                "only another agent may call this, over TLS with a certificate of the cluster",
            )),
        }
    }
}

fn caller(info: Option<&ConnectInfo<Caller>>) -> Caller {
    info.map_or(Caller::Nobody, |ConnectInfo(caller)| caller.clone())
}

/// A JSON body; what is wrong with it is answered in the API's own words.
#[derive(Debug)]
pub struct Json<T>(
    /// The value.
    pub T,
);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match axum::Json::<T>::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(match rejection.status() {
                axum::http::StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(rejection.body_text()),
                _ => ApiError::invalid(rejection.body_text()),
            }),
        }
    }
}

/// The router and its OpenAPI document. Both come from the same list.
fn build(agent: Option<Arc<Agent>>) -> (OpenApiRouter<Arc<Agent>>, Option<Arc<Agent>>) {
    let mut vms = OpenApiRouter::new()
        .routes(routes!(routes_vm::show, routes_vm::remove))
        .routes(routes!(routes_vm::start))
        .routes(routes!(routes_vm::stop))
        .routes(routes!(routes_vm::power_button))
        .routes(routes!(routes_vm::console))
        .routes(routes!(routes_vm::move_vm))
        .routes(routes!(routes_checkpoint::take))
        .routes(routes!(routes_estimate::estimate))
        .routes(routes!(routes_definition::edit))
        .routes(routes!(routes_definition::rename))
        .routes(routes!(routes_definition::clone_vm));
    let mut moves = OpenApiRouter::new().routes(routes!(routes_vm::progress, routes_vm::cancel));
    if let Some(agent) = &agent {
        vms = vms.route_layer(from_fn_with_state(agent.clone(), forward::vm_elsewhere));
        moves = moves.route_layer(from_fn_with_state(agent.clone(), forward::move_elsewhere));
    }
    let router = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(routes_host::openapi_document))
        .routes(routes!(routes_host::host))
        .routes(routes!(routes_host::hosts, routes_peer::hear_of))
        .routes(routes!(routes_host::join))
        .routes(routes!(routes_removal::removal))
        .routes(routes!(routes_removal::remove))
        .routes(routes!(routes_removal::ties))
        .routes(routes!(routes_removal::removed, routes_removal::hear_of_removed))
        .routes(routes!(routes_placement::inventory))
        .routes(routes!(routes_placement::cluster_inventory))
        .routes(routes!(routes_placement::maintenance))
        .routes(routes!(routes_host::add_datastore))
        .routes(routes!(routes_host::remove_datastore))
        .routes(routes!(routes_vm::list, routes_vm::create))
        .merge(vms)
        .merge(moves)
        .routes(routes!(routes_watch::moves))
        .routes(routes!(routes_watch::events))
        .routes(routes!(routes_watch::metrics))
        .routes(routes!(routes_recovery::recover))
        .routes(routes!(routes_recovery::take_over))
        .routes(routes!(routes_recovery::discard_lost))
        .routes(routes!(routes_recovery::standing))
        .routes(routes!(routes_recovery::settle))
        .routes(routes!(routes_checkpoint::list))
        .routes(routes!(routes_checkpoint::remove))
        .routes(routes!(routes_checkpoint::restore))
        .routes(routes!(routes_checkpoint::file))
        .routes(routes!(routes_estimate::probe))
        .routes(routes!(routes_peer::offer))
        .routes(routes!(routes_peer::discard))
        .routes(routes!(routes_peer::file))
        .routes(routes!(routes_peer::start))
        .routes(routes!(routes_peer::verdict));
    (router, agent)
}

/// The OpenAPI document, as `docs/openapi.json` holds it.
pub fn openapi() -> Result<String, ApiError> {
    let (_, document) = build(None).0.split_for_parts();
    let text = document
        .to_pretty_json()
        .map_err(|e| ApiError::internal(format!("cannot write the OpenAPI document: {e}")))?;
    Ok(text + "\n")
}

/// The whole API of an agent.
pub fn router(agent: Arc<Agent>) -> Router {
    let (router, _) = build(Some(agent.clone()));
    let (router, _) = router.split_for_parts();
    router
        .method_not_allowed_fallback(async || {
            ApiError::not_found("there is no such call in this API; see GET /v1/openapi.json")
        })
        .fallback(async || ApiError::not_found("there is no such call in this API; see GET /v1/openapi.json"))
        .layer(from_fn_with_state(agent.clone(), only_known))
        .with_state(agent)
}

/// Somebody without a certificate may ask to join, and nothing else; a host that was removed from the cluster not even that.
async fn only_known(State(agent): Shared, request: Request, next: Next) -> Response {
    let joins = request.uri().path() == "/v1/join";
    match caller(request.extensions().get()) {
        Caller::Nobody if !joins => {
            ApiError::forbidden("this needs a certificate of the cluster; see `vmove join`").into_response()
        }
        Caller::Host(name) if agent.is_removed(&name) => ApiError::forbidden(format!(
            "host {name} was removed from the cluster; make it a new one with `vmove join` and another --name"
        ))
        .into_response(),
        _ => next.run(request).await,
    }
}

impl Agent {
    /// Serves the API until [`Agent::end`]; VM processes of an earlier agent are taken over first. `ready` is told when calls are
    /// answered.
    pub async fn serve(self: Arc<Self>, ready: impl FnOnce()) -> Result<(), AgentError> {
        let unix = listen_unix(self.socket())?;
        let tls = match &self.tls {
            Some(tls) => Some(TlsListener::bind(self.config.listen, tls).await?),
            None => None,
        };
        self.adopt().await?;
        tokio::spawn(self.clone().gossip());
        let service = router(self.clone()).into_make_service_with_connect_info::<Caller>();
        let ended = || {
            let mut ending = self.ending.subscribe();
            async move {
                // An error means that the agent is gone: ended too.
                let _ = ending.wait_for(|ending| *ending).await;
            }
        };
        let mut servers = tokio::task::JoinSet::new();
        servers.spawn(axum::serve(unix, service.clone()).with_graceful_shutdown(ended()).into_future());
        if let Some(tls) = tls {
            tracing::info!(host = self.config.name, address = %tls.address(), "agent listens");
            servers.spawn(axum::serve(tls, service).with_graceful_shutdown(ended()).into_future());
        }
        ready();
        ended().await;
        // Consoles and long calls may go on for ever: they get a moment.
        let grace = std::time::Duration::from_secs(1);
        if tokio::time::timeout(grace, async { while servers.join_next().await.is_some() {} }).await.is_err()
        {
            servers.abort_all();
        }
        // Best effort: the next agent removes it too.
        let _ = std::fs::remove_file(self.socket());
        Ok(())
    }
}

/// State of the handlers.
pub type Shared = State<Arc<Agent>>;
