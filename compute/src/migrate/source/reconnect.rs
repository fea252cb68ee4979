//! Making the connections of a move anew after one of them was lost.
//!
//! A thread of its own waits for the threads of the old connections, so that nothing of them can post an event any more, and calls the
//! target until it answers or the time is up; meanwhile the move can be cancelled.
//! Lives here: ending old connections, calling, going on with the streams. Never enters: whether to, and what was lost (the engine's).

use std::{
    io::ErrorKind,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vmove_mirror::{source::Event, wire::control::Arrived};

use super::{
    super::{
        MoveError,
        blocks_out::BlocksOut,
        pages_out::{EndedPages, PagesOut},
    },
    Driver,
    peer::{Caller, Links, Peer},
};

/// How long the target is called.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a host may refuse every connection before the process there counts as gone: it listens as long as it lives.
const REFUSED: Duration = Duration::from_secs(5);
/// First gap between two attempts; it doubles.
const FIRST_GAP: Duration = Duration::from_millis(100);
/// Largest gap between two attempts.
const LAST_GAP: Duration = Duration::from_secs(2);

/// Connections made anew, and the page stream that waits for one of them.
pub(super) struct Redialled {
    links: Links,
    pages: EndedPages,
}

/// What the thread that calls and the driver share.
#[derive(Default)]
pub(super) struct Redial {
    given_up: AtomicBool,
    made: Mutex<Option<Redialled>>,
}

impl Redial {
    /// Ends the calling, soon.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }

    fn take(&self) -> Option<Redialled> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A page stream whose connection was lost.
enum Lost {
    Running(PagesOut),
    Ended(EndedPages),
}

impl Driver {
    /// Ends all connections and has them made anew; `Connected` or `GaveUp` comes of it.
    pub(super) fn reconnect(&mut self) -> Result<(), MoveError> {
        self.mirrors.iter().for_each(BlocksOut::away);
        self.pending_links.clear();
        self.awaiting_word = None;
        let gone = || MoveError::Machine("the streams of the move have ended".into());
        let control = match std::mem::replace(&mut self.peer, Peer::None) {
            Peer::Remote { closer, reader, .. } => {
                closer.close();
                Some(reader)
            }
            Peer::None | Peer::Local(_) => None,
        };
        // Lost again before the streams went on, or while they did.
        let pages = match (self.redialled.take(), self.pages.take()) {
            (Some(made), _) => Lost::Ended(made.pages),
            (None, Some(pages)) => {
                pages.close();
                Lost::Running(pages)
            }
            (None, None) => return Err(gone()),
        };
        let caller = self.caller()?;
        let redial = Arc::new(Redial::default());
        self.redial = Some(Arc::clone(&redial));
        let (mirrors, events, first) = (Arc::clone(&self.mirrors), self.task.events.clone(), self.epoch + 1);
        let call = move || {
            if control.is_some_and(|reader| reader.join().is_err()) {
                tracing::error!("the control connection's thread has panicked");
            }
            mirrors.iter().for_each(BlocksOut::end_connection);
            let pages = match pages {
                Lost::Running(pages) => pages.end(),
                Lost::Ended(pages) => Some(pages),
            };
            // Holds the disks' mirrors no longer than it must.
            drop(mirrors);
            let Some(pages) = pages else {
                let _ = events.send(Event::Failed("the page stream's thread has panicked".into()));
                return;
            };
            let event = match redial.call(&caller, first) {
                Ok(links) => {
                    let made = Redialled { links, pages };
                    *redial.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
                    Event::Connected
                }
                Err(error) => Event::GaveUp(error.to_string()),
            };
            // Nobody listens any more if the move was given up meanwhile.
            let _ = events.send(event);
        };
        let spawned = thread::Builder::new().name("reconnect".into()).spawn(call);
        spawned.map(|_| ()).map_err(MoveError::io("start a thread"))
    }

    /// The connections are there: the control connection is listened to; the streams wait for what the target has to say.
    pub(super) fn connected_again(&mut self) -> Result<(), MoveError> {
        let Some(mut made) = self.redial.take().and_then(|redial| redial.take()) else { return Ok(()) };
        self.epoch = made.links.epoch;
        if let Some(control) = made.links.control.take() {
            self.listen(control)?;
        }
        tracing::info!(epoch = self.epoch, "connected to the target again");
        self.redialled = Some(made);
        Ok(())
    }

    /// Goes on with the streams from what the target has.
    pub(super) fn restore(&mut self, arrived: &Arrived) -> Result<Event, MoveError> {
        let made = self.redialled.take();
        let Redialled { links, mut pages } =
            made.ok_or_else(|| MoveError::Machine("there are no new connections".into()))?;
        if arrived.operations.len() != self.mirrors.len() {
            return Err(MoveError::Machine(format!(
                "the target speaks of {} disks, {} are copied",
                arrived.operations.len(),
                self.mirrors.len()
            )));
        }
        let (lost, bytes) = pages.roll_back(arrived.frames)?;
        self.pages = Some(pages.go_on(links.pages, self.task.events.clone())?);
        if self.mirrors.is_empty() {
            self.pending_links = links.disks;
        } else {
            for ((mirror, link), operations) in self.mirrors.iter().zip(links.disks).zip(&arrived.operations)
            {
                mirror.go_on(link, *operations)?;
            }
        }
        tracing::info!(pages = lost.len(), "the move goes on; these pages had not arrived");
        Ok(Event::Restored { lost, bytes })
    }
}

impl Redial {
    /// Calls until there are connections, from epoch `epoch` on.
    fn call(&self, caller: &Caller, mut epoch: u32) -> Result<Links, MoveError> {
        let (began, mut gap, mut refused) = (Instant::now(), FIRST_GAP, None);
        loop {
            if self.given_up.load(Ordering::SeqCst) {
                return Err(MoveError::Machine("the move was given up".into()));
            }
            let error = match caller.call(epoch) {
                Ok(links) => return Ok(links),
                Err(error) => error,
            };
            tracing::debug!(%error, epoch, "the target cannot be called");
            epoch += 1;
            let kind = if let MoveError::Io { source, .. } = &error { Some(source.kind()) } else { None };
            refused = if kind == Some(ErrorKind::ConnectionRefused) {
                refused.or(Some(Instant::now()))
            } else {
                None
            };
            let gone = refused.is_some_and(|since| since.elapsed() > REFUSED);
            if gone || began.elapsed() + gap > PATIENCE {
                return Err(error);
            }
            thread::sleep(gap);
            gap = (gap * 2).min(LAST_GAP);
        }
    }
}
