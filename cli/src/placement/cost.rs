//! Predictions: bytes, seconds, downtime of a move, and of all moves together.
//!
//! Memory: each round sends what turned dirty in the one before, so the RAM in use times `1 / (1 - dirty rate / link rate)` in all, until a round
//! is short enough for the pause. Together: every link carries what goes through it, and no more than so many moves run at once; that
//! is what an executor that never idles comes close to. Never enters: what fits.

use super::room::{Choice, Index};

/// What a move costs beside its bytes, seconds: agreeing, connecting, ending.
const SETUP: f64 = 1.0;
/// What a pause costs beside its last pages, ms.
const PAUSE_MS: f64 = 20.0;
/// A round this short is sent in the pause, seconds.
const LAST_ROUND: f64 = 0.05;
/// A link must be this much faster than RAM turns dirty.
const MARGIN: f64 = 1.25;

/// What a move is predicted to take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Bytes of RAM on the wire.
    pub memory_bytes: u64,
    /// Seconds, with as many others at once as the plan says.
    pub seconds: f64,
    /// Downtime, ms.
    pub downtime_ms: u64,
}

impl Index<'_> {
    /// What a move between two hosts gets when it is alone, bytes a second.
    pub fn rate(&self, from: usize, to: usize) -> u64 {
        let hosts = &self.cluster.hosts;
        let links = hosts[from].bandwidth.min(hosts[to].bandwidth);
        self.request.bandwidth.map_or(links, |budget| budget.min(links)).max(1)
    }

    /// Whether a VM's memory can be moved to a host at all.
    pub fn converges(&self, vm: usize, host: usize) -> bool {
        self.cluster.vms[vm].dirty_rate as f64 * MARGIN < self.rate(self.home(vm), host) as f64
    }

    /// How many of these moves may run at once: every one of them must converge with its share.
    pub fn at_once(&self, choices: &[Choice]) -> usize {
        let most = choices.iter().map(|choice| {
            let dirty = self.cluster.vms[choice.vm].dirty_rate as f64 * MARGIN;
            let rate = self.rate(self.home(choice.vm), choice.host) as f64;
            if dirty > 0.0 { (rate / dirty) as usize } else { usize::MAX }
        });
        most.min().unwrap_or(usize::MAX).min(self.request.parallel).min(choices.len()).max(1)
    }

    /// Bytes of RAM that a move sends at a rate.
    fn memory_bytes(&self, vm: usize, rate: f64) -> f64 {
        let vm = &self.cluster.vms[vm];
        let again = (vm.dirty_rate as f64 / rate).min(1.0 / MARGIN);
        vm.touched_bytes as f64 / (1.0 - again)
    }

    /// What one move takes, `at_once` of them sharing the links.
    pub fn predict(&self, choice: &Choice, at_once: usize) -> Prediction {
        let rate = self.rate(self.home(choice.vm), choice.host) as f64 / at_once as f64;
        let vm = &self.cluster.vms[choice.vm];
        let memory = self.memory_bytes(choice.vm, rate);
        let again = (vm.dirty_rate as f64 / rate).min(1.0 / MARGIN);
        let mut round = vm.touched_bytes as f64 / rate;
        while round > LAST_ROUND {
            round *= again;
        }
        Prediction {
            memory_bytes: memory as u64,
            seconds: SETUP + (memory + choice.copied as f64) / rate,
            downtime_ms: (PAUSE_MS + round * 1000.0).ceil() as u64,
        }
    }

    /// Seconds that a choice keeps a link of `bandwidth` busy, when it has it for itself.
    pub fn busy(&self, choice: &Choice, bandwidth: u64) -> f64 {
        let alone = self.rate(self.home(choice.vm), choice.host) as f64;
        (self.memory_bytes(choice.vm, alone) + choice.copied as f64) / bandwidth.max(1) as f64
    }

    /// Seconds for all of these moves.
    pub fn total_seconds(&self, choices: &[Choice], at_once: usize) -> f64 {
        let mut load = Load::new(self);
        for choice in choices {
            load.add(choice);
        }
        load.seconds(at_once)
    }
}

/// What the links are busy with.
#[derive(Debug, Clone)]
pub struct Load<'a> {
    index: &'a Index<'a>,
    links: Vec<f64>,
    budget: f64,
    alone: f64,
    longest: f64,
    moves: usize,
}

impl<'a> Load<'a> {
    /// Nothing.
    pub fn new(index: &'a Index<'a>) -> Self {
        let links = vec![0.0; index.cluster.hosts.len()];
        Self { index, links, budget: 0.0, alone: 0.0, longest: 0.0, moves: 0 }
    }

    /// Adds a move.
    pub fn add(&mut self, choice: &Choice) {
        let index = self.index;
        for host in [index.home(choice.vm), choice.host] {
            self.links[host] += index.busy(choice, index.cluster.hosts[host].bandwidth);
        }
        if let Some(budget) = index.request.bandwidth {
            self.budget += index.busy(choice, budget);
        }
        let alone = index.busy(choice, index.rate(index.home(choice.vm), choice.host));
        self.alone += alone;
        self.longest = self.longest.max(alone);
        self.moves += 1;
    }

    /// Seconds until a host's link would be through with what it has and this too.
    pub fn with(&self, choice: &Choice) -> f64 {
        let index = self.index;
        let link = |host: usize| self.links[host] + index.busy(choice, index.cluster.hosts[host].bandwidth);
        link(choice.host).max(link(index.home(choice.vm)))
    }

    /// Seconds for all of it.
    pub fn seconds(&self, at_once: usize) -> f64 {
        let at_once = at_once.max(1) as f64;
        let links = self.links.iter().copied().fold(self.budget, f64::max);
        links.max(self.longest).max(self.alone / at_once) + SETUP * (self.moves as f64 / at_once).ceil()
    }
}
