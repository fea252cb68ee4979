//! Emptying hosts for real: from what the agents say to a plan, and from a plan to moves, led by the client.
//!
//! | module | what lives there |
//! |---|---|
//! | [`observed`] | what the agents say, as the planner wants it |
//! | [`plan_file`] | limits, and the plan as a file |
//! | [`drive`] | carrying a plan out |
//! | [`report`] | what came of it |
//!
//! Nothing is noted of how far it is: VMs are where the agents say. So a client that is killed leaves moves going on in the agents, and
//! the next one, told the same, finds what is done, adopts what is under way, and goes on. Never enters: what fits (`placement`), moving a VM
//! (the agents do), words for people.

pub mod drive;
pub mod observed;
pub mod plan_file;
pub mod report;
