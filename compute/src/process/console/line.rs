//! The two directions of the serial line as numbers: positions of output, counts of keys.
//!
//! Both go on where they were after a move: [`Saved`] is part of the machine's saved state. Lives here: what is kept, what is
//! missed, what was typed before. Never enters: threads, sockets.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::wire::{ClientId, RunId};

/// Bytes of output kept for those who attach, and for those who attach again after a move. It travels in the pause.
pub const BACKLOG: usize = 256 << 10;
/// Most clients whose keys are counted; the one that has typed longest ago is forgotten first.
pub const MAX_TYPISTS: usize = 64;

/// The guest's output: all bytes counted, the last of them kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    run: RunId,
    end: u64,
    recent: VecDeque<u8>,
}

impl Output {
    /// Nothing said yet in this run.
    pub fn new(run: RunId) -> Self {
        Self { run, end: 0, recent: VecDeque::new() }
    }

    /// The guest's run.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The same line in another run.
    pub fn begin_run(&mut self, run: RunId) {
        self.run = run;
    }

    /// Number of bytes so far: the position of the next.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Position of the oldest byte that is kept.
    pub fn oldest(&self) -> u64 {
        self.end - self.recent.len() as u64
    }

    /// The guest says something.
    pub fn push(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        self.recent.extend(bytes);
        let over = self.recent.len().saturating_sub(BACKLOG);
        self.recent.drain(..over);
    }

    /// Where a client begins that has seen that much of a run: where it was, if it is this run, else at the oldest byte.
    pub fn start(&self, seen: Option<(RunId, u64)>) -> u64 {
        match seen {
            Some((run, at)) if run == self.run => at.min(self.end),
            _ => self.oldest(),
        }
    }

    /// Up to `most` bytes from position `from`, and the position they really begin at: later, if those are not kept any more.
    pub fn read(&self, from: u64, most: usize) -> (u64, Vec<u8>) {
        let at = from.clamp(self.oldest(), self.end);
        let skip = (at - self.oldest()) as usize;
        let until = self.recent.len().min(skip.saturating_add(most));
        (at, self.recent.range(skip..until).copied().collect())
    }
}

/// Who has typed how much. A client sends again what it does not know to be taken; here it is taken once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Typists(Vec<(ClientId, u64)>);

impl Typists {
    /// Keys taken of a client; none if it is not known.
    pub fn taken(&self, client: ClientId) -> Option<u64> {
        self.0.iter().find(|(id, _)| *id == client).map(|(_, taken)| *taken)
    }

    /// What is new of keys that a client says are its `at`-th and following. Keys it left out it does not want typed.
    pub fn fresh<'a>(&self, client: ClientId, at: u64, keys: &'a [u8]) -> &'a [u8] {
        let known = self.taken(client).unwrap_or(0).saturating_sub(at);
        keys.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default()
    }

    /// All of a client's keys before `count` are taken.
    pub fn took(&mut self, client: ClientId, count: u64) {
        let taken = self.taken(client).unwrap_or(0).max(count);
        self.0.retain(|(id, _)| *id != client);
        if self.0.len() == MAX_TYPISTS {
            self.0.remove(0);
        }
        self.0.push((client, taken));
    }
}

/// Both directions, as they travel with the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    run: RunId,
    end: u64,
    recent: Vec<u8>,
    typists: Vec<(ClientId, u64)>,
}

impl Saved {
    /// Both directions as they are.
    pub fn of(output: &Output, typists: &Typists) -> Self {
        let recent = output.recent.iter().copied().collect();
        Self { run: output.run, end: output.end, recent, typists: typists.0.clone() }
    }

    /// Both directions again. It comes from another host: more than is kept here, or a count below what is kept, is refused.
    pub fn restore(self) -> Result<(Output, Typists), String> {
        // Half the range, so that no guest can talk the count over its end.
        if self.recent.len() > BACKLOG || self.recent.len() as u64 > self.end || self.end > u64::MAX / 2 {
            return Err(format!("{} bytes of output kept of {}", self.recent.len(), self.end));
        }
        if self.typists.len() > MAX_TYPISTS {
            return Err(format!("{} clients that type", self.typists.len()));
        }
        let mut typists = Typists::default();
        for (client, taken) in self.typists {
            typists.took(client, taken);
        }
        Ok((Output { run: self.run, end: self.end, recent: self.recent.into() }, typists))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: RunId = [1; 16];
    const ME: ClientId = [2; 16];

    #[test]
    fn the_last_bytes_are_kept_and_all_are_counted() {
        let mut output = Output::new(RUN);
        output.push(b"hello");
        assert_eq!((output.oldest(), output.end()), (0, 5));
        assert_eq!(output.read(1, 2), (1, b"el".to_vec()));
        output.push(&vec![b'x'; BACKLOG]);
        assert_eq!((output.oldest(), output.end()), (5, 5 + BACKLOG as u64));
        assert_eq!(output.read(2, 1), (5, b"x".to_vec()), "missed bytes show in the position");
        assert_eq!(output.read(u64::MAX, 9), (output.end(), vec![]));
    }

    #[test]
    fn clients_go_on_where_they_were_in_this_run_only() {
        let mut output = Output::new(RUN);
        output.push(b"hello");
        assert_eq!(output.start(None), 0);
        assert_eq!(output.start(Some((RUN, 3))), 3);
        assert_eq!(output.start(Some((RUN, 30))), 5);
        assert_eq!(output.start(Some(([9; 16], 3))), 0);
    }

    #[test]
    fn keys_are_taken_once() {
        let mut typists = Typists::default();
        assert_eq!(typists.fresh(ME, 0, b"abc"), b"abc");
        typists.took(ME, 2);
        assert_eq!(typists.taken(ME), Some(2));
        assert_eq!(typists.fresh(ME, 0, b"abc"), b"c");
        assert_eq!(typists.fresh(ME, 0, b"ab"), b"");
        assert_eq!(typists.fresh(ME, 0, b"a"), b"");
        assert_eq!(typists.fresh(ME, 9, b"z"), b"z", "what it left out is its own choice");
        typists.took(ME, 1);
        assert_eq!(typists.taken(ME), Some(2), "never back");
    }

    #[test]
    fn many_clients_push_out_the_one_that_typed_longest_ago() {
        let mut typists = Typists::default();
        for client in 0..=MAX_TYPISTS as u8 {
            typists.took([client; 16], 1);
            typists.took([0; 16], u64::from(client));
        }
        assert_eq!(typists.taken([1; 16]), None);
        assert_eq!(typists.taken([0; 16]), Some(MAX_TYPISTS as u64));
        assert_eq!(typists.0.len(), MAX_TYPISTS);
    }

    #[test]
    fn nonsense_is_not_restored() {
        let mut output = Output::new(RUN);
        output.push(b"hello");
        let good = Saved::of(&output, &Typists::default());
        assert_eq!(good.clone().restore().unwrap().0, output);
        let bad = [
            Saved { end: 4, ..good.clone() },
            Saved { end: u64::MAX, ..good.clone() },
            Saved { end: 1 << 40, recent: vec![0; BACKLOG + 1], ..good.clone() },
            Saved { typists: vec![(ME, 1); MAX_TYPISTS + 1], ..good },
        ];
        assert!(bad.into_iter().all(|saved| saved.restore().is_err()));
    }
}
