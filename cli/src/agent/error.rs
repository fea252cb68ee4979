//! The one error of the agent: an HTTP status, a stable word, a sentence, and everything that stands in the way.
//!
//! Lives here: how failures of storage, processes, peers and identity look to a client. Never enters: deciding anything.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::api::types::{ErrorBody, ErrorDetail};
use crate::identity::IdentityError;

/// A request that is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable snake_case word, see [`ErrorDetail::code`].
    pub code: String,
    /// What was tried, on what, what to do.
    pub message: String,
    /// Everything that stands in the way.
    pub blockers: Vec<String>,
}

impl ApiError {
    fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.to_owned(), message: message.into(), blockers: Vec::new() }
    }

    /// The thing asked for is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    /// The name is in use.
    pub fn name_taken(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "name_taken", message)
    }

    /// Something else is being done with it.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "busy", message)
    }

    /// It is not in the state this needs.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// Nobody knows yet who owns the VM.
    pub fn undecided(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "undecided", message)
    }

    /// Things stand in the way.
    pub fn blocked(message: impl Into<String>, blockers: Vec<String>) -> Self {
        Self { blockers, ..Self::new(StatusCode::CONFLICT, "blocked", message) }
    }

    /// The caller may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// More than this agent takes.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// Another agent could not be asked.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "peer_unreachable", message)
    }

    /// A VM's process failed, or did not answer.
    pub fn vm_process(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "vm_process", message)
    }

    /// Files of this host could not be read or written.
    pub fn storage(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "storage", message)
    }

    /// A mistake of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// What another agent answered, under its own status and word.
    pub fn from_peer(status: StatusCode, detail: ErrorDetail) -> Self {
        Self { status, code: detail.code, message: detail.message, blockers: detail.blockers }
    }

    /// Wraps a system error for an action on a path.
    pub fn io(action: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::storage(format!("cannot {action} {}: {error}", path.display()))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let detail = ErrorDetail { code: self.code, message: self.message, blockers: self.blockers };
        (self.status, Json(ErrorBody { error: detail })).into_response()
    }
}

impl From<vmove_storage::BlockError> for ApiError {
    fn from(error: vmove_storage::BlockError) -> Self {
        match error {
            vmove_storage::BlockError::BadName { .. } | vmove_storage::BlockError::BadSpec { .. } => {
                Self::invalid(error.to_string())
            }
            _ => Self::storage(error.to_string()),
        }
    }
}

impl From<IdentityError> for ApiError {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Token(_) => Self::forbidden(error.to_string()),
            IdentityError::BadHostName { .. } | IdentityError::Certificate { .. } => {
                Self::invalid(error.to_string())
            }
            IdentityError::NoAuthority => Self::conflict(error.to_string()),
            IdentityError::Io { .. } | IdentityError::Damaged { .. } => Self::storage(error.to_string()),
        }
    }
}

impl From<vmove_mirror::journal::JournalError> for ApiError {
    fn from(error: vmove_mirror::journal::JournalError) -> Self {
        Self::storage(error.to_string())
    }
}

/// Runs blocking file work off the runtime's threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("a worker of the agent failed; see its log")))
}

/// Runs a call's work in a task of its own, so that a caller that hangs up does not leave it half done.
pub async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work).await.unwrap_or_else(|_| Err(ApiError::internal("the agent failed; see its log")))
}
