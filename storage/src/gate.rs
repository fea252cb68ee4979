//! Orders requests of one disk by range: ordinary requests pass together, a discard passes alone.
//!
//! A discard gives a cluster back while a read or write may still be using the mapping it looked up; the
//! cluster may by then belong to someone else (cloud-hypervisor #8624 lost data that way). So a discard waits for
//! every earlier request on its range, and every later one waits for it. Admission is in order of arrival, so
//! nobody starves. The gate also bounds how many requests run at once.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

/// What a request does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads and writes, which may overlap each other.
    Shared,
    /// Discards and zeroings.
    Alone,
}

struct Entry {
    ticket: u64,
    range: Range<u64>,
    access: Access,
    admitted: bool,
    waker: Option<Waker>,
}

struct State {
    /// In order of arrival.
    entries: Vec<Entry>,
    next_ticket: u64,
    admitted: usize,
    alone: usize,
}

/// The gate of one disk.
pub(crate) struct RangeGate {
    state: RefCell<State>,
    limit: usize,
}

impl RangeGate {
    /// A gate that admits at most `limit` requests at a time.
    pub(crate) fn new(limit: usize) -> Self {
        let state = State { entries: Vec::new(), next_ticket: 0, admitted: 0, alone: 0 };
        Self { state: RefCell::new(state), limit }
    }

    /// Waits for admission to `range`; the pass ends when it is dropped.
    pub(crate) async fn enter(&self, range: Range<u64>, access: Access) -> Pass<'_> {
        let pass = {
            let mut state = self.state.borrow_mut();
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.alone += usize::from(access == Access::Alone);
            state.entries.push(Entry { ticket, range, access, admitted: false, waker: None });
            let last = state.entries.len() - 1;
            if state.may_enter(last, self.limit) {
                state.admit(last);
            }
            Pass { gate: self, ticket }
        };
        poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            let index = state.index(pass.ticket);
            let entry = &mut state.entries[index];
            if entry.admitted {
                return Poll::Ready(());
            }
            entry.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        pass
    }
}

impl State {
    fn index(&self, ticket: u64) -> usize {
        self.entries.binary_search_by_key(&ticket, |entry| entry.ticket).expect("a pass has its entry")
    }

    fn may_enter(&self, index: usize, limit: usize) -> bool {
        if self.admitted >= limit {
            return false;
        }
        // Without a discard around, only the bound matters.
        self.alone == 0 || {
            let entry = &self.entries[index];
            !self.entries[..index].iter().any(|earlier| {
                (earlier.access == Access::Alone || entry.access == Access::Alone)
                    && earlier.range.start < entry.range.end
                    && entry.range.start < earlier.range.end
            })
        }
    }

    fn admit(&mut self, index: usize) -> Option<Waker> {
        self.admitted += 1;
        let entry = &mut self.entries[index];
        entry.admitted = true;
        entry.waker.take()
    }
}

/// Admission to a range; dropping it lets the next ones in.
pub(crate) struct Pass<'a> {
    gate: &'a RangeGate,
    ticket: u64,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut wakers = Vec::new();
        let gone = {
            let mut state = self.gate.state.borrow_mut();
            let index = state.index(self.ticket);
            let gone = state.entries.remove(index);
            state.admitted -= usize::from(gone.admitted);
            state.alone -= usize::from(gone.access == Access::Alone);
            if state.entries.len() > state.admitted {
                for index in 0..state.entries.len() {
                    if !state.entries[index].admitted && state.may_enter(index, self.gate.limit) {
                        wakers.extend(state.admit(index));
                    }
                }
            }
            gone
        };
        drop(gone);
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Context;

    type Entering<'a> = Pin<Box<dyn Future<Output = Pass<'a>> + 'a>>;

    fn enter(gate: &RangeGate, range: Range<u64>, access: Access) -> Entering<'_> {
        Box::pin(gate.enter(range, access))
    }

    fn try_poll<'a>(entering: &mut Entering<'a>) -> Option<Pass<'a>> {
        match entering.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(pass) => Some(pass),
            Poll::Pending => None,
        }
    }

    #[test]
    fn shared_requests_overlap_and_a_discard_waits_for_them() {
        let gate = RangeGate::new(8);
        let first = try_poll(&mut enter(&gate, 0..10, Access::Shared)).unwrap();
        let second = try_poll(&mut enter(&gate, 5..15, Access::Shared)).unwrap();
        let mut discard = enter(&gate, 8..20, Access::Alone);
        assert!(try_poll(&mut discard).is_none());
        let mut later = enter(&gate, 18..30, Access::Shared);
        assert!(try_poll(&mut later).is_none(), "a later request must not overtake the discard");
        let elsewhere = try_poll(&mut enter(&gate, 20..30, Access::Shared)).unwrap();
        drop(first);
        assert!(try_poll(&mut discard).is_none());
        drop(second);
        let discarding = try_poll(&mut discard).unwrap();
        assert!(try_poll(&mut later).is_none());
        drop(discarding);
        assert!(try_poll(&mut later).is_some());
        drop(elsewhere);
    }

    #[test]
    fn a_waiter_that_gives_up_lets_the_others_in() {
        let gate = RangeGate::new(8);
        let reading = try_poll(&mut enter(&gate, 0..10, Access::Shared)).unwrap();
        let mut discard = enter(&gate, 0..10, Access::Alone);
        assert!(try_poll(&mut discard).is_none());
        let mut writing = enter(&gate, 0..10, Access::Shared);
        assert!(try_poll(&mut writing).is_none());
        drop(discard);
        assert!(try_poll(&mut writing).is_some());
        drop(reading);
    }

    #[test]
    fn the_bound_holds_and_moves_on() {
        let gate = RangeGate::new(2);
        let one = try_poll(&mut enter(&gate, 0..1, Access::Shared)).unwrap();
        let two = try_poll(&mut enter(&gate, 1..2, Access::Shared)).unwrap();
        let mut three = enter(&gate, 2..3, Access::Shared);
        assert!(try_poll(&mut three).is_none());
        drop(one);
        assert!(try_poll(&mut three).is_some());
        drop(two);
    }
}
