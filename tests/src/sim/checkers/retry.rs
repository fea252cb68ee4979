//! A retry after any failure succeeds without cleaning.

use super::super::world::World;

impl World {
    /// With nothing failing any more a move was ordered; it has had its time.
    pub fn check_retry(&mut self, done: bool) {
        let last = self.user.last.clone();
        if !done || last.as_ref().is_none_or(|(committed, _)| !committed) || self.user.tries > 1 {
            self.violate(
                "retry",
                format!("a move with nothing in its way did not come through at once: {last:?}"),
            );
        }
    }
}
