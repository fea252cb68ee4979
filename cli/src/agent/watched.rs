//! The moves that this agent leads, for whoever watches: those that go on, a stream of what becomes of them, counters.
//!
//! Lives here: keeping and passing on what was seen. Never enters: following a move (`moves`), how it is shown.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::broadcast;

use super::metrics::Metrics;
use crate::api::watch::WatchedMove;

/// How long the end of a move is still in the list, so that a watcher that looks now and then sees it.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Events a slow listener may be behind before it misses some.
const BACKLOG: usize = 1024;

/// The board on which moves are shown.
#[derive(Debug)]
pub struct Watched {
    moves: Mutex<BTreeMap<String, Shown>>,
    events: broadcast::Sender<WatchedMove>,
    /// Counters of all moves that ended.
    pub metrics: Metrics,
}

#[derive(Debug)]
struct Shown {
    last: WatchedMove,
    ended: Option<Instant>,
}

impl Default for Watched {
    fn default() -> Self {
        Self { moves: Mutex::default(), events: broadcast::Sender::new(BACKLOG), metrics: Metrics::default() }
    }
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Shown>> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A move was looked at. One that is as it was is no event.
    pub fn seen(&self, now: WatchedMove) {
        let mut moves = self.lock();
        let id = now.progress.move_id.clone();
        if moves.get(&id).is_none_or(|shown| shown.last != now) {
            moves.insert(id, Shown { last: now.clone(), ended: None });
            // Nobody listening is no error.
            let _ = self.events.send(now);
        }
    }

    /// A move has ended so.
    pub fn ended(&self, end: WatchedMove) {
        self.metrics.ended(&end.progress);
        let shown = Shown { last: end.clone(), ended: Some(Instant::now()) };
        self.lock().insert(end.progress.move_id.clone(), shown);
        let _ = self.events.send(end);
    }

    /// A move is not followed any more, and how it ended is not known.
    pub fn lost(&self, move_id: &str) {
        self.lock().remove(move_id);
    }

    /// Moves that go on, and those that ended moments ago.
    pub fn moves(&self) -> Vec<WatchedMove> {
        let mut moves = self.lock();
        moves.retain(|_, shown| shown.ended.is_none_or(|at| at.elapsed() < REMEMBERED));
        moves.values().map(|shown| shown.last.clone()).collect()
    }

    /// Moves that go on.
    pub fn going_on(&self) -> usize {
        self.lock().values().filter(|shown| shown.ended.is_none()).count()
    }

    /// What happens from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<WatchedMove> {
        self.events.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::MoveProgress;

    fn at(phase: &str) -> WatchedMove {
        let progress: MoveProgress = serde_json::from_value(serde_json::json!({
            "move_id": "m", "phase": phase, "elapsed_ms": 1, "disk_total_bytes": 0, "disk_done_bytes": 0, "ram_total_bytes": 0,
            "ram_done_bytes": 0, "round": 0, "rate": 0, "dirty_rate": 0, "left_ms": null, "report": null, "error": null,
        }))
        .unwrap();
        WatchedMove { vm: "web".into(), from_host: "a".into(), to_host: "b".into(), progress }
    }

    #[test]
    fn every_change_is_an_event_and_the_end_stays_for_a_while() {
        let watched = Watched::default();
        let mut events = watched.subscribe();
        for phase in ["setup", "mirror", "mirror"] {
            watched.seen(at(phase));
        }
        assert_eq!(watched.going_on(), 1);
        watched.ended(at("cancelled"));
        assert_eq!((watched.going_on(), watched.moves()), (0, vec![at("cancelled")]));
        let phases: Vec<String> =
            std::iter::from_fn(|| events.try_recv().ok()).map(|seen| seen.progress.phase).collect();
        assert_eq!(phases, ["setup", "mirror", "cancelled"]);
        watched.lost("m");
        assert!(watched.moves().is_empty());
    }
}
