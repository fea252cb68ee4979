//! What is promised, one property a file. A checker only looks; the first broken promise ends the world.
//!
//! | module | property |
//! |---|---|
//! | [`one_runner`] | at most one machine runs the VM at any instant |
//! | [`flushed`] | no flushed write is lost, no read sees anything but what was written |
//! | [`equal_at_switch`] | RAM and disks are equal when the other side takes over |
//! | [`runs_on`] | after any failure before the commit the source runs on, and no request of the guest hangs |
//! | [`no_need_of_source`] | after the commit nothing is needed from the source |
//! | [`moves_end`] | every move ends, or waits with a named reason |
//! | [`retry`] | a retry after any failure succeeds without cleaning |
//! | [`no_leftovers`] | no file is left over that nobody owns |

pub mod equal_at_switch;
pub mod flushed;
pub mod moves_end;
pub mod no_leftovers;
pub mod no_need_of_source;
pub mod one_runner;
pub mod retry;
pub mod runs_on;

use super::world::Shape;

/// What the checkers remember.
pub struct Checkers {
    /// Writes and flushes of the guest.
    pub flushed: flushed::Flushed,
    /// What sources held when they committed.
    pub switch: equal_at_switch::Switches,
    /// Requests of the guest.
    pub runs_on: runs_on::RunsOn,
}

impl Checkers {
    /// Nothing has happened yet.
    pub fn new(shape: &Shape) -> Self {
        Self {
            flushed: flushed::Flushed::new(&shape.disks),
            switch: equal_at_switch::Switches::default(),
            runs_on: runs_on::RunsOn,
        }
    }
}
