//! The console of a VM: an upgraded HTTP connection, bridged byte for byte to the VM process's `console.sock`.
//!
//! A client whose VM has gone asks its agent again, which knows or asks the others where it is (`forward`). Never enters: what the
//! bytes mean, who has seen what: client and VM process know that.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::response::Response;
use hyper::StatusCode;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use vmove_compute::process::protocol::CONSOLE_SOCKET;

use super::Agent;
use super::error::ApiError;
use super::vms::word;
use crate::api::types::CONSOLE_PROTOCOL;
use crate::client::connect_unix;

/// Whether a request asks for the console protocol.
pub fn wants_upgrade(request: &Request) -> bool {
    let header = request.headers().get(UPGRADE).and_then(|value| value.to_str().ok());
    header.is_some_and(|value| value.eq_ignore_ascii_case(CONSOLE_PROTOCOL))
}

/// The answer that changes to the console protocol.
pub fn switching() -> Result<Response, ApiError> {
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, CONSOLE_PROTOCOL)
        .body(Body::empty())
        .map_err(|e| ApiError::internal(format!("cannot answer: {e}")))
}

/// Bridges the caller, once its connection is upgraded, with the other side, until either ends.
pub fn bridge(upgrade: OnUpgrade, mut other: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let mut caller = TokioIo::new(upgraded);
                // How it ended is of no interest: one side has hung up.
                let _ = tokio::io::copy_bidirectional(&mut caller, &mut other).await;
            }
            Err(error) => tracing::debug!(%error, "a console connection was not upgraded"),
        }
    });
}

impl Agent {
    /// Connects the caller to a VM's console.
    pub async fn console(&self, name: &str, mut request: Request) -> Result<Response, ApiError> {
        if !wants_upgrade(&request) {
            return Err(ApiError::invalid(format!(
                "the console needs an HTTP upgrade to {CONSOLE_PROTOCOL:?}"
            )));
        }
        let view = self.must_view(name).await?;
        if view.pid.is_none() {
            return Err(ApiError::conflict(format!(
                "VM {name:?} is {}: it has no console",
                word(view.state)
            )));
        }
        let upgrade = request
            .extensions_mut()
            .remove::<OnUpgrade>()
            .ok_or_else(|| ApiError::invalid("this connection cannot be upgraded"))?;
        let path = self.registry.vm(name)?.path().join(CONSOLE_SOCKET);
        let stream = connect_unix(&path).await.map_err(|e| {
            ApiError::vm_process(format!("cannot connect to the console of VM {name:?}: {e}"))
        })?;
        bridge(upgrade, stream);
        switching()
    }
}
