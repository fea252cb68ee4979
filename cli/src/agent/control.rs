//! One exchange with a VM process: a JSON line there, a JSON line back, then the connection is closed.
//!
//! Lives here: the socket and its limits. Never enters: what to ask, what to make of the answer.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use vmove_compute::process::protocol::{CONTROL_SOCKET, MAX_LINE, ProcessStatus, Reply, Request};

use crate::client::connect_unix;

/// How long a VM process has to answer. Every question is answered from memory.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens: the process is gone, or not up yet.
    #[error("the VM's process does not listen on {CONTROL_SOCKET}: {0}")]
    Gone(std::io::Error),
    /// It listens, and the exchange failed.
    #[error("the VM's process did not answer: {0}")]
    Failed(String),
    /// It answered that it will not.
    #[error("{0}")]
    Refused(String),
}

/// Asks the VM process in `dir`. [`Reply::Error`] becomes [`ControlError::Refused`].
pub async fn ask(dir: &Path, request: &Request) -> Result<Reply, ControlError> {
    match tokio::time::timeout(DEADLINE, exchange(dir, request)).await {
        Ok(Ok(Reply::Error(reason))) => Err(ControlError::Refused(reason)),
        Ok(result) => result,
        Err(_) => Err(ControlError::Failed(format!("nothing within {} s", DEADLINE.as_secs()))),
    }
}

/// What the VM process in `dir` is doing.
pub async fn status(dir: &Path) -> Result<ProcessStatus, ControlError> {
    match ask(dir, &Request::Status).await? {
        Reply::Status(status) => Ok(status),
        other => Err(unexpected(&other)),
    }
}

/// The error for an answer that does not fit the question.
pub fn unexpected(reply: &Reply) -> ControlError {
    let kind = match reply {
        Reply::Ok => "ok",
        Reply::Status(_) => "status",
        Reply::MoveStatus(_) => "move status",
        Reply::Verdict(_) => "verdict",
        Reply::Measured(_) => "measurement",
        Reply::Error(_) => "error",
    };
    ControlError::Failed(format!("an answer of another kind ({kind})"))
}

async fn exchange(dir: &Path, request: &Request) -> Result<Reply, ControlError> {
    let failed = |e: std::io::Error| ControlError::Failed(e.to_string());
    let mut stream = connect_unix(&dir.join(CONTROL_SOCKET)).await.map_err(ControlError::Gone)?;
    let mut line = serde_json::to_vec(request).map_err(|e| ControlError::Failed(e.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(failed)?;
    let mut answer = Vec::new();
    let mut reader = BufReader::new(stream).take(MAX_LINE as u64 + 1);
    reader.read_until(b'\n', &mut answer).await.map_err(failed)?;
    if answer.len() > MAX_LINE {
        return Err(ControlError::Failed(format!("an answer of more than {MAX_LINE} bytes")));
    }
    if answer.is_empty() {
        return Err(ControlError::Failed("it closed the connection".to_owned()));
    }
    serde_json::from_slice(&answer).map_err(|e| ControlError::Failed(format!("not understood: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_are_read_and_refusals_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(status(dir.path()).await, Err(ControlError::Gone(_))));
        let listener = tokio::net::UnixListener::bind(dir.path().join(CONTROL_SOCKET)).unwrap();
        let serve = tokio::spawn(async move {
            for answer in ["\"ok\"\n", "{\"error\":\"no\"}\n", "rubbish\n", ""] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = String::new();
                BufReader::new(&mut stream).read_line(&mut line).await.unwrap();
                assert_eq!(line, "\"cancel\"\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(ask(dir.path(), &Request::Cancel).await.unwrap(), Reply::Ok);
        let refused = ask(dir.path(), &Request::Cancel).await.unwrap_err();
        assert_eq!(refused.to_string(), "no");
        for _ in 0..2 {
            assert!(matches!(ask(dir.path(), &Request::Cancel).await, Err(ControlError::Failed(_))));
        }
        serve.await.unwrap();
    }
}
