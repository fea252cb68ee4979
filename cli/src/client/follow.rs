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
