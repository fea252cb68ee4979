//! Following a move to its end, over restarts of the agent that leads it.

use std::time::Duration;

use tokio::time::Instant;

use super::{Client, ClientError};
use crate::api::types::MoveProgress;

/// How long an agent may be out of reach (it is being restarted) before following gives up.
const AGENT_GONE_LIMIT: Duration = Duration::from_secs(30);

impl Client {
    /// Asks every `interval` until the move has ended (a report or an error is there), showing each answer to `seen`.
    ///
    /// An agent that is out of reach for a while is waited for: the move itself does not need it.
    pub async fn follow(
        &self,
        move_id: &str,
        interval: Duration,
        mut seen: impl FnMut(&MoveProgress),
    ) -> Result<MoveProgress, ClientError> {
        let mut last_answer = Instant::now();
        loop {
            match self.move_progress(move_id).await {
                Ok(progress) => {
                    last_answer = Instant::now();
                    seen(&progress);
                    if progress.report.is_some() || progress.error.is_some() {
                        return Ok(progress);
                    }
                }
                Err(error) if error.is_connection() && last_answer.elapsed() < AGENT_GONE_LIMIT => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(interval).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::Path;
    use axum::routing::get;
    use axum::{Json, Router};
    use tokio::net::UnixListener;

    fn progress(id: &str, phase: &str, error: Option<&str>) -> MoveProgress {
        MoveProgress {
            move_id: id.to_owned(),
            phase: phase.to_owned(),
            error: error.map(str::to_owned),
            ..MoveProgress::default()
        }
    }

    fn agent(
        socket: &std::path::Path,
        phase: &'static str,
        error: Option<&'static str>,
    ) -> std::io::Result<Agent> {
        let listener = UnixListener::bind(socket)?;
        let answer = move |Path(id): Path<String>| async move { Json(progress(&id, phase, error)) };
        let app = Router::new().route("/v1/moves/{id}", get(answer));
        Ok(tokio::spawn(async move { axum::serve(listener, app).await }))
    }

    type Agent = tokio::task::JoinHandle<std::io::Result<()>>;

    #[tokio::test]
    async fn an_agent_that_restarts_in_the_middle_is_waited_for() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("agent.sock");
        let mut first = Some(agent(&socket, "mirror", None)?);
        let mut second = None;
        let mut phases = Vec::new();
        let client = Client::unix(&socket);
        let ended = client
            .follow("m1", Duration::from_millis(1), |seen| {
                phases.push(seen.phase.clone());
                if let Some(first) = first.take() {
                    // The next question meets a socket that nobody listens on, or one that is not there, or the new agent.
                    first.abort();
                    let socket = socket.clone();
                    second = Some(tokio::spawn(async move {
                        let _ = first.await;
                        std::fs::remove_file(&socket)?;
                        agent(&socket, "aborted", Some("no space"))
                    }));
                }
            })
            .await?;
        assert_eq!(ended.error.as_deref(), Some("no space"));
        assert_eq!(ended.move_id, "m1");
        assert_eq!(
            (phases.first(), phases.last()),
            (Some(&"mirror".to_owned()), Some(&"aborted".to_owned()))
        );
        second.ok_or_else(|| anyhow::anyhow!("the second agent was started"))?.await??.abort();
        Ok(())
    }

    #[tokio::test]
    async fn a_move_nobody_knows_ends_the_following() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket)?;
        let served = tokio::spawn(async move { axum::serve(listener, Router::new()).await });
        let result = Client::unix(&socket).follow("m1", Duration::from_millis(1), |_| {}).await;
        assert!(matches!(result, Err(ClientError::Api { status: 404, .. })));
        served.abort();
        Ok(())
    }
}
