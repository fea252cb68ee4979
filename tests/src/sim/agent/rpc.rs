//! Letters between agents: delayed, lost with their link or their reader; the one who waits for an answer gives up in time.
//!
//! Never enters: what is decided from an answer.

use vmove_mirror::{
    journal::{DiskAt, MoveId, Verdict},
    recovery::Holding,
};

use super::{
    super::{
        HostId, Pid,
        world::{Happening, World},
    },
    moves::Draft,
};

/// How long a short question waits for its answer (`SHORT` of the agents' client).
pub const SHORT: u64 = 5_000_000;
/// How long a long one waits (`LONG`).
pub const LONG: u64 = 60_000_000;

/// What is asked.
#[derive(Debug, Clone)]
pub enum Ask {
    /// Take this VM?
    Offer {
        /// The move.
        move_id: MoveId,
        /// Generation after the commit.
        generation: u64,
        /// Where its images would lie.
        disks: Vec<DiskAt>,
    },
    /// Start the process that awaits it.
    Start {
        /// The move.
        move_id: MoveId,
    },
    /// Forget a move that was not committed.
    Discard {
        /// The move.
        move_id: MoveId,
    },
    /// How did this move go?
    Verdict {
        /// The move.
        move_id: MoveId,
    },
    /// What do you hold of the VM, after this move of it to you?
    Holding {
        /// The move.
        move_id: MoveId,
    },
}

/// What is answered.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Yes, or done.
    Yes,
    /// No, and why.
    No(String),
    /// The process that awaits the source.
    Listening {
        /// Its number.
        pid: Pid,
        /// The one-time ticket.
        ticket: [u8; 16],
    },
    /// The source's word.
    Word(Verdict),
    /// What is held here.
    Holds(Holding),
}

/// What is done with an answer.
#[derive(Debug, Clone)]
pub enum Then {
    /// The target has been asked to take the VM.
    Offered(Box<Draft>),
    /// The target's process has been started.
    Started(Box<Draft>),
    /// Nothing.
    Nothing,
    /// A VM without a process, prepared here, is settled.
    Settle {
        /// Hosts that were not asked yet.
        left: Vec<HostId>,
        /// Gap before the next question.
        gap: u64,
    },
    /// A waiting process is told.
    Tell {
        /// The process.
        pid: Pid,
        /// The move.
        move_id: MoveId,
    },
}

/// A letter.
#[derive(Debug, Clone)]
pub struct Letter {
    id: u64,
    from: HostId,
    to: HostId,
    /// The life of the agent that asks.
    epoch: u32,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Ask(Ask),
    Answer(Answer),
}

impl World {
    /// Asks another host's agent.
    pub fn ask(&mut self, from: HostId, to: HostId, ask: Ask, patience: u64, then: Then) {
        let id = self.next_stamp;
        self.next_stamp += 1;
        let agent = &mut self.hosts[from].agent;
        agent.waiting.insert(id, then);
        let epoch = agent.epoch;
        self.after(patience, Happening::LetterLost { host: from, id });
        self.post_letter(Letter { id, from, to, epoch, body: Body::Ask(ask) });
    }

    fn post_letter(&mut self, letter: Letter) {
        let delay = self.net.latency + self.dice.net.range(0..2_000);
        if self.net.cut_until(letter.from, letter.to, self.now) == 0 {
            self.after(delay, Happening::Letter(Box::new(letter)));
        }
    }

    /// A letter arrives.
    pub fn letter(&mut self, letter: Letter) {
        let Letter { id, from, to, epoch, body } = letter;
        let reader = &mut self.hosts[to].agent;
        match body {
            Body::Ask(_) if !reader.up => {
                // With the host alive, the connection is refused at once.
                if self.hosts[to].powered {
                    self.letter_lost(from, id);
                }
            }
            Body::Ask(ask) => {
                let answer = self.answer(from, to, ask);
                self.post_letter(Letter { id, from: to, to: from, epoch, body: Body::Answer(answer) });
            }
            Body::Answer(answer) => {
                if reader.up
                    && reader.epoch == epoch
                    && let Some(then) = reader.waiting.remove(&id)
                {
                    self.go_on(to, then, Some(answer));
                }
            }
        }
    }

    /// An answer did not come.
    pub fn letter_lost(&mut self, host: HostId, id: u64) {
        if let Some(then) = self.hosts[host].agent.waiting.remove(&id) {
            self.go_on(host, then, None);
        }
    }

    fn answer(&mut self, from: HostId, here: HostId, ask: Ask) -> Answer {
        match ask {
            Ask::Offer { move_id, generation, disks } => {
                self.receive_offer(from, here, move_id, generation, disks)
            }
            Ask::Start { move_id } => self.start_incoming(from, here, &move_id),
            Ask::Discard { move_id } => self.discard_incoming(from, here, &move_id),
            Ask::Verdict { move_id } => Answer::Word(self.verdict(from, here, &move_id)),
            Ask::Holding { move_id } => match self.holds(here, &move_id) {
                Some(holding) => Answer::Holds(holding),
                None => Answer::No("the journal cannot be synced".into()),
            },
        }
    }

    fn go_on(&mut self, host: HostId, then: Then, answer: Option<Answer>) {
        match then {
            Then::Offered(draft) => self.offered(host, *draft, answer),
            Then::Started(draft) => self.started(host, *draft, answer),
            Then::Nothing => {}
            Then::Settle { left, gap } => self.settle_answered(host, answer, left, gap),
            Then::Tell { pid, move_id } => self.word_fetched(host, pid, &move_id, answer),
        }
    }
}
