//! A client's place on a console: what it has seen, what it has typed, over as many connections and hosts as it takes.
//!
//! Pure: messages in, what there is to show or to send out. Lives here: positions and counts of this side. Never enters: sockets, time.

use std::collections::VecDeque;

use vmove_compute::process::console::wire::{ClientId, ClientMsg, MAX_KEYS, RunId, ServerMsg, VERSION};

/// Keys sent and not yet known to be taken; more wait here, so that a guest that does not read fills no socket.
const WINDOW: u64 = 4 * MAX_KEYS as u64;

/// What a message means for who watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The guest says.
    Output(Vec<u8>),
    /// This many bytes were not kept for us.
    Missed(u64),
    /// The guest was started again: what follows is another life of it.
    Anew,
    /// This many keys are not known to be taken and are not typed again.
    KeysLost(u64),
    /// It runs on this host now.
    Moved(String),
    /// The VM has stopped, for this reason.
    Ended(String),
}

/// A message that does not fit what came before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachmentError {
    /// The console refuses this client.
    #[error("{0}")]
    Refused(String),
    /// The other side does not keep to the protocol.
    #[error("the console sent a message out of turn")]
    OutOfTurn,
}

/// A client's place on a console.
#[derive(Debug)]
pub struct Attachment {
    id: ClientId,
    run: Option<RunId>,
    next: u64,
    /// On this connection: whether the console has greeted us, and what the guest had said by then.
    greeted: bool,
    caught_up_at: u64,
    /// Keys not known to be taken; the first is number `base`.
    keys: VecDeque<u8>,
    base: u64,
    /// Keys before this were sent on this connection.
    sent: u64,
    /// Keys before this were sent on some connection.
    ever_sent: u64,
}

impl Attachment {
    /// A client that has seen and typed nothing.
    pub fn new(id: ClientId) -> Self {
        Self {
            id,
            run: None,
            next: 0,
            greeted: false,
            caught_up_at: 0,
            keys: VecDeque::new(),
            base: 0,
            sent: 0,
            ever_sent: 0,
        }
    }

    /// Begins a connection; what is to be said first.
    pub fn connect(&mut self) -> ClientMsg {
        self.greeted = false;
        let seen = self.run.map(|run| (run, self.next));
        ClientMsg::Attach { version: VERSION, client: self.id, seen }
    }

    /// The user types.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.keys.extend(keys);
    }

    /// Keys that are not known to be taken.
    pub fn waiting_keys(&self) -> usize {
        self.keys.len()
    }

    /// The guest's run, once the console has greeted us.
    pub fn run(&self) -> Option<RunId> {
        self.run
    }

    /// Whether the console has greeted us on this connection.
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Whether all is seen that had been said when this connection began.
    pub fn has_caught_up(&self) -> bool {
        self.greeted && self.next >= self.caught_up_at
    }

    /// Keys to be sent now, if any.
    pub fn next_keys(&mut self) -> Option<ClientMsg> {
        let end = (self.base + self.keys.len() as u64).min(self.base + WINDOW);
        if !self.greeted || self.sent >= end {
            return None;
        }
        let at = self.sent;
        let skip = (at - self.base) as usize;
        let count = ((end - at) as usize).min(MAX_KEYS);
        let bytes = self.keys.range(skip..skip + count).copied().collect();
        self.sent += count as u64;
        self.ever_sent = self.ever_sent.max(self.sent);
        Some(ClientMsg::Keys { at, bytes })
    }

    /// Takes a message in; gives what is to be shown, in order.
    pub fn receive(&mut self, message: ServerMsg) -> Result<Vec<Seen>, AttachmentError> {
        Ok(match message {
            ServerMsg::Attached { run, at, end, taken } if !self.greeted => {
                self.greet(run, at, end, taken).into_iter().collect()
            }
            ServerMsg::Output { at, bytes } if self.greeted => {
                let end = at.checked_add(bytes.len() as u64).ok_or(AttachmentError::OutOfTurn)?;
                let missed = at.saturating_sub(self.next);
                let known = usize::try_from(self.next.saturating_sub(at)).unwrap_or(usize::MAX);
                self.next = self.next.max(end);
                let fresh = bytes.get(known..).unwrap_or_default();
                let mut seen = Vec::new();
                seen.extend((missed > 0).then_some(Seen::Missed(missed)));
                seen.extend((!fresh.is_empty()).then(|| Seen::Output(fresh.to_vec())));
                seen
            }
            ServerMsg::Taken { count } if self.greeted && count <= self.sent => {
                self.forget_keys(count);
                Vec::new()
            }
            ServerMsg::Moved { host } => vec![Seen::Moved(host)],
            ServerMsg::Ended { reason } => vec![Seen::Ended(reason)],
            ServerMsg::Refused { reason } => return Err(AttachmentError::Refused(reason)),
            ServerMsg::Alive => Vec::new(),
            _ => return Err(AttachmentError::OutOfTurn),
        })
    }

    fn greet(&mut self, run: RunId, at: u64, end: u64, taken: Option<u64>) -> Option<Seen> {
        let before = self.run.replace(run);
        (self.greeted, self.caught_up_at) = (true, end);
        if before == Some(run) {
            // The console may have kept less than we want: its first output says so.
            match taken {
                Some(taken) => self.forget_keys(taken),
                // It has forgotten us: what was sent may have been taken, and no key is typed twice.
                None => {
                    let unsure = self.ever_sent.saturating_sub(self.base);
                    self.forget_keys(self.ever_sent);
                    self.sent = self.base;
                    return (unsure > 0).then_some(Seen::KeysLost(unsure));
                }
            }
            self.sent = self.base;
            return None;
        }
        self.next = at;
        // What was typed to the guest before was not meant for this one; before the first greeting nothing was sent.
        let meant = before.is_some();
        if meant {
            self.forget_keys(self.base + self.keys.len() as u64);
        }
        self.sent = self.base;
        meant.then_some(Seen::Anew)
    }

    /// Keys before `count` need not be sent again.
    fn forget_keys(&mut self, count: u64) {
        let known = (count.saturating_sub(self.base) as usize).min(self.keys.len());
        self.keys.drain(..known);
        self.base += known as u64;
        self.sent = self.sent.max(self.base);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmove_compute::process::console::line::{BACKLOG, Output, Saved, Typists};

    use super::*;

    const RUN: RunId = [1; 16];
    const ME: ClientId = [9; 16];

    fn attached(at: u64, taken: Option<u64>) -> ServerMsg {
        ServerMsg::Attached { run: RUN, at, end: at, taken }
    }

    #[test]
    fn output_is_seen_once_and_gaps_are_told() {
        let mut client = Attachment::new(ME);
        assert_eq!(client.connect(), ClientMsg::Attach { version: VERSION, client: ME, seen: None });
        let output = |at, text: &[u8]| ServerMsg::Output { at, bytes: text.to_vec() };
        assert!(client.receive(output(0, b"early")).is_err());
        assert_eq!(client.receive(attached(10, None)), Ok(vec![]));
        assert_eq!(client.receive(output(10, b"abc")), Ok(vec![Seen::Output(b"abc".to_vec())]));
        assert_eq!(
            client.connect(),
            ClientMsg::Attach { version: VERSION, client: ME, seen: Some((RUN, 13)) }
        );
        assert_eq!(client.receive(attached(13, None)), Ok(vec![]));
        assert_eq!(client.receive(output(12, b"cd")), Ok(vec![Seen::Output(b"d".to_vec())]));
        assert_eq!(client.receive(output(0, b"ab")), Ok(vec![]));
        let gap = vec![Seen::Missed(6), Seen::Output(b"x".to_vec())];
        assert_eq!(client.receive(output(20, b"x")), Ok(gap));
        assert!(client.receive(output(u64::MAX, b"x")).is_err());
    }

    #[test]
    fn keys_go_on_where_the_console_has_taken_them() {
        let mut client = Attachment::new(ME);
        client.connect();
        client.type_in(b"abc");
        assert_eq!(client.next_keys(), None, "not before it is greeted");
        client.receive(attached(0, None)).unwrap();
        assert_eq!(client.next_keys(), Some(ClientMsg::Keys { at: 0, bytes: b"abc".to_vec() }));
        assert!(client.receive(ServerMsg::Taken { count: 4 }).is_err(), "more than was sent");
        client.receive(ServerMsg::Taken { count: 1 }).unwrap();
        client.connect();
        client.receive(attached(0, Some(2))).unwrap();
        client.type_in(b"d");
        assert_eq!(client.next_keys(), Some(ClientMsg::Keys { at: 2, bytes: b"cd".to_vec() }));
        client.connect();
        client.type_in(b"e");
        assert_eq!(client.receive(attached(0, None)), Ok(vec![Seen::KeysLost(2)]), "it has forgotten us");
        assert_eq!(client.next_keys(), Some(ClientMsg::Keys { at: 4, bytes: b"e".to_vec() }));
    }

    #[test]
    fn another_run_begins_anew_without_old_keys() {
        let mut client = Attachment::new(ME);
        client.connect();
        client.receive(attached(500, None)).unwrap();
        client.type_in(b"reboot\n");
        client.next_keys();
        client.connect();
        let other = ServerMsg::Attached { run: [2; 16], at: 0, end: 5, taken: None };
        assert_eq!(client.receive(other), Ok(vec![Seen::Anew]));
        assert!(!client.has_caught_up());
        assert_eq!(client.next_keys(), None);
        client.type_in(b"x");
        assert_eq!(client.next_keys(), Some(ClientMsg::Keys { at: 7, bytes: b"x".to_vec() }));
        let said = ServerMsg::Output { at: 0, bytes: b"hello".to_vec() };
        assert_eq!(client.receive(said), Ok(vec![Seen::Output(b"hello".to_vec())]));
        assert!(client.has_caught_up());
    }

    /// What may happen between a guest, its console and one client.
    #[derive(Debug, Clone)]
    enum Step {
        Say(usize),
        Type(usize),
        /// The console tells the client up to so many bytes.
        Tell(usize),
        /// The guest has room for so many keys of what the client sends; the client may not hear of it.
        Take(usize, bool),
        Cut,
        /// The VM goes to another process, with its saved state.
        Move,
        /// It would have gone, and stays; the state is thrown away.
        GiveUp,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1usize..400).prop_map(Step::Say),
            3 => (1usize..40).prop_map(Step::Type),
            6 => (1usize..600).prop_map(Step::Tell),
            4 => (0usize..50, any::<bool>()).prop_map(|(room, heard)| Step::Take(room, heard)),
            2 => Just(Step::Cut),
            2 => Just(Step::Move),
            1 => Just(Step::GiveUp),
            1 => (BACKLOG / 2..BACKLOG * 2).prop_map(Step::Say),
        ]
    }

    /// The whole of both directions, and what the client has made of it.
    struct World {
        output: Output,
        typists: Typists,
        client: Attachment,
        /// Position of the console's thread for this connection; none: not connected.
        telling: Option<u64>,
        said: Vec<u8>,
        seen: Vec<(bool, u64, Vec<u8>)>,
        typed: Vec<u8>,
        taken: Vec<u8>,
    }

    impl World {
        fn connect(&mut self) {
            let ClientMsg::Attach { seen, client, .. } = self.client.connect() else { unreachable!() };
            let at = self.output.start(seen);
            let (end, taken) = (self.output.end(), self.typists.taken(client));
            self.telling = Some(at);
            let greeted = self.client.receive(ServerMsg::Attached { run: self.output.run(), at, end, taken });
            assert_eq!(greeted, Ok(vec![]));
        }

        fn carry(&self) -> (Output, Typists) {
            let bytes = postcard::to_stdvec(&Saved::of(&self.output, &self.typists)).unwrap();
            postcard::from_bytes::<Saved>(&bytes).unwrap().restore().unwrap()
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Say(count) => {
                    let from = self.said.len();
                    self.said.extend((from..from + count).map(|i| (i * 7 % 251) as u8));
                    self.output.push(&self.said[from..]);
                }
                Step::Type(count) => {
                    let from = self.typed.len();
                    self.typed.extend((from..from + count).map(|i| (i * 11 % 253) as u8));
                    self.client.type_in(&self.typed[from..]);
                }
                Step::Tell(most) => {
                    let Some(from) = self.telling else { return self.connect() };
                    let (at, bytes) = self.output.read(from, most);
                    self.telling = Some(at + bytes.len() as u64);
                    for seen in self.client.receive(ServerMsg::Output { at, bytes }).unwrap() {
                        match seen {
                            Seen::Missed(count) => self.seen.push((false, count, vec![])),
                            Seen::Output(bytes) => self.seen.push((true, bytes.len() as u64, bytes)),
                            other => panic!("{other:?}"),
                        }
                    }
                }
                Step::Take(room, heard) => {
                    if self.telling.is_none() {
                        return self.connect();
                    }
                    let Some(ClientMsg::Keys { at, bytes }) = self.client.next_keys() else { return };
                    let fresh = self.typists.fresh(ME, at, &bytes);
                    let count = fresh.len().min(room);
                    self.taken.extend(&fresh[..count]);
                    let left = (fresh.len() - count) as u64;
                    self.typists.took(ME, at + bytes.len() as u64 - left);
                    if heard && left == 0 {
                        let count = self.typists.taken(ME).unwrap();
                        self.client.receive(ServerMsg::Taken { count }).unwrap();
                    } else {
                        // The rest waits in a thread that is cut off: the client has to send it again.
                        self.telling = None;
                    }
                }
                Step::Cut => self.telling = None,
                Step::Move => {
                    (self.output, self.typists) = self.carry();
                    self.telling = None;
                }
                Step::GiveUp => drop(self.carry()),
            }
        }
    }

    proptest! {
        #[test]
        fn over_cuts_moves_and_lag_the_stream_is_whole_and_keys_come_once(
            steps in proptest::collection::vec(step(), 0..120)
        ) {
            let mut world = World {
                output: Output::new(RUN),
                typists: Typists::default(),
                client: Attachment::new(ME),
                telling: None,
                said: vec![],
                seen: vec![],
                typed: vec![],
                taken: vec![],
            };
            world.connect();
            for step in steps {
                world.step(step);
            }
            // In the end all is told and taken.
            world.connect();
            while world.telling != Some(world.output.end()) {
                world.step(Step::Tell(MAX_KEYS));
            }
            while world.client.waiting_keys() > 0 {
                world.step(Step::Take(MAX_KEYS, true));
            }
            prop_assert_eq!(&world.taken, &world.typed);
            let mut at = 0;
            for (shown, count, bytes) in world.seen {
                let end = at + count as usize;
                if shown {
                    prop_assert_eq!(&world.said[at..end], &bytes[..]);
                }
                at = end;
            }
            prop_assert_eq!(at, world.said.len());
        }
    }
}
