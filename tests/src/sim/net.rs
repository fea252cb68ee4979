//! The network between simulated hosts: connections in order each, with delay and bandwidth; silence, resets, half-open ends.
//!
//! As `compute`'s links set up their sockets, a peer that has gone silently is noticed after 20 s; a cut shorter than that only delays.
//! Lives here: when what arrives, and who learns that it will not. Never enters: what is sent.

use std::collections::{BTreeMap, VecDeque};

use vmove_mirror::{Micros, wire::hello::Role};

use super::{
    HostId, Pid,
    world::{Happening, World},
};

/// Silence after which a connection is given up (`TCP_USER_TIMEOUT` and keep-alives of `compute::migrate::link`).
pub const SILENCE: Micros = 20_000_000;

/// Number of a connection.
pub type ConnId = u32;

/// What goes over a connection as one.
#[derive(Debug, Clone)]
pub enum Packet {
    /// A hello of the caller.
    Hello([u8; 32]),
    /// Its answer.
    Answer([u8; 16]),
    /// Header and head of a frame as bytes; its data as stamps.
    Frame {
        /// Header and head.
        bytes: Vec<u8>,
        /// One stamp a page or sector.
        data: Vec<u64>,
    },
    /// The other end closed.
    End,
}

#[derive(Debug, Default)]
struct Flow {
    queue: VecDeque<(Micros, Packet)>,
    /// When the last byte so far leaves.
    free_at: Micros,
    /// When the last packet so far arrives.
    last_at: Micros,
}

/// A connection: end 0 called, end 1 was called.
#[derive(Debug)]
pub struct Conn {
    /// Host and process of both ends.
    pub ends: [(HostId, Pid); 2],
    /// What it is for.
    pub role: Role,
    flows: [Flow; 2],
    open: [bool; 2],
}

/// All connections, and the links that are cut.
#[derive(Debug, Default)]
pub struct Net {
    conns: BTreeMap<ConnId, Conn>,
    next: ConnId,
    /// Cut directions of links, and until when.
    cuts: BTreeMap<(HostId, HostId), Micros>,
    /// Bytes per microsecond of a connection.
    pub bandwidth: u64,
    /// One way, microseconds.
    pub latency: Micros,
}

impl Net {
    /// No connections yet.
    pub fn new(bandwidth: u64, latency: Micros) -> Self {
        Self { bandwidth, latency, ..Self::default() }
    }

    /// Until when nothing passes from `a` to `b`; 0 = it passes.
    pub fn cut_until(&self, a: HostId, b: HostId, now: Micros) -> Micros {
        self.cuts.get(&(a, b)).copied().filter(|until| *until > now).unwrap_or(0)
    }

    /// Ends all cuts.
    pub fn heal(&mut self) {
        self.cuts.clear();
    }

    /// The connection.
    pub fn conn(&self, id: ConnId) -> Option<&Conn> {
        self.conns.get(&id)
    }

    /// Whether an end has not seen its connection end.
    pub fn is_open(&self, id: ConnId, end: usize) -> bool {
        self.conns.get(&id).is_some_and(|conn| conn.open[end])
    }

    /// When what was sent so far by this end has left.
    pub fn sent_by(&self, id: ConnId, end: usize) -> Micros {
        self.conns.get(&id).map_or(0, |conn| conn.flows[end].free_at)
    }

    /// Connections that are open at both ends and go between two hosts.
    pub fn between_hosts(&self) -> Vec<ConnId> {
        let remote = |conn: &Conn| conn.ends[0].0 != conn.ends[1].0 && conn.open == [true; 2];
        self.conns.iter().filter(|(_, conn)| remote(conn)).map(|(id, _)| *id).collect()
    }

    fn of(&self, pid: Pid) -> Vec<(ConnId, usize)> {
        let mut out = Vec::new();
        for (id, conn) in &self.conns {
            out.extend(
                (0..2).filter(|end| conn.ends[*end].1 == pid && conn.open[*end]).map(|end| (*id, end)),
            );
        }
        out
    }
}

impl World {
    /// Opens a connection; nothing is said on it yet.
    pub fn dial(&mut self, from: (HostId, Pid), to: (HostId, Pid), role: Role) -> ConnId {
        let id = self.net.next;
        self.net.next += 1;
        let conn = Conn { ends: [from, to], role, flows: Default::default(), open: [true; 2] };
        self.net.conns.insert(id, conn);
        id
    }

    /// Sends; whether the connection was still open at this end.
    pub fn send(&mut self, id: ConnId, end: usize, packet: Packet) -> bool {
        let (latency, bandwidth) = (self.net.latency, self.net.bandwidth);
        let jitter = self.dice.net.range(0..latency / 2 + 1);
        let now = self.now;
        let Some(conn) = self.net.conns.get_mut(&id) else { return false };
        if !conn.open[end] {
            return false;
        }
        let bytes = match &packet {
            Packet::Frame { bytes, data } => {
                let unit =
                    if matches!(conn.role, Role::Disk(_)) { super::storage::SECTOR_BYTES } else { 4096 };
                bytes.len() as u64 + data.len() as u64 * unit
            }
            _ => 64,
        };
        // Within a process, as in a datastore-only move, there is no link to wait for.
        let local = conn.ends[0].0 == conn.ends[1].0;
        let (wire, delay) = if local { (bytes / 10_000, 5) } else { (bytes / bandwidth, latency + jitter) };
        let flow = &mut conn.flows[end];
        flow.free_at = flow.free_at.max(now) + wire;
        flow.last_at = flow.last_at.max(flow.free_at + delay);
        let at = flow.last_at;
        flow.queue.push_back((at, packet));
        self.at(at, Happening::Deliver { conn: id, from: end });
        true
    }

    /// The head of a flow has arrived, unless the link is cut: then it comes once that has healed.
    pub fn deliver(&mut self, id: ConnId, from: usize) {
        let now = self.now;
        let Some(conn) = self.net.conns.get(&id) else { return };
        let (a, b) = (conn.ends[from].0, conn.ends[1 - from].0);
        let healed = self.net.cut_until(a, b, now);
        let resend = self.dice.net.range(200..2_000);
        let Some(conn) = self.net.conns.get_mut(&id) else { return };
        let flow = &mut conn.flows[from];
        let Some((due, _)) = flow.queue.front() else { return };
        if healed > 0 || *due > now {
            let at = if healed > 0 { healed + resend } else { *due };
            flow.last_at = flow.last_at.max(at);
            // All that is behind waits as well.
            for (due, _) in &mut flow.queue {
                *due = (*due).max(at);
            }
            return self.at(at, Happening::Deliver { conn: id, from });
        }
        let Some((_, packet)) = flow.queue.pop_front() else { return };
        let to = 1 - from;
        if conn.open[to] {
            self.arrive(id, to, packet);
        } else if conn.open[from] && !matches!(packet, Packet::End) {
            // Nobody there: a reset comes back.
            let at = now + self.net.latency;
            self.at(at, Happening::Lost { conn: id, end: from });
        }
    }

    /// An end learns that its connection is gone.
    pub fn lose(&mut self, id: ConnId, end: usize) {
        let Some(conn) = self.net.conns.get_mut(&id) else { return };
        if !std::mem::take(&mut conn.open[end]) {
            return;
        }
        // What had not arrived never will.
        conn.flows[1 - end].queue.clear();
        let ((_, pid), role) = (conn.ends[end], conn.role);
        if conn.open == [false; 2] {
            self.net.conns.remove(&id);
        }
        self.connection_lost(pid, role, id, end);
    }

    /// Closes this end: what was sent before still arrives, unless the other end's last words meet a closed door first.
    pub fn close(&mut self, id: ConnId, end: usize) {
        self.send(id, end, Packet::End);
        let rude = self.dice.net.one_in(2);
        let at = self.now + self.net.latency;
        let Some(conn) = self.net.conns.get_mut(&id) else { return };
        conn.open[end] = false;
        let unread = !conn.flows[1 - end].queue.is_empty();
        if unread && rude && conn.open[1 - end] {
            // Closed with bytes unread, the kernel resets the connection: what was on its way to the other end may be dropped.
            self.at(at, Happening::Lost { conn: id, end: 1 - end });
        }
    }

    /// Closes all connections of a process that has ended.
    pub fn close_all(&mut self, pid: Pid) {
        for (id, end) in self.net.of(pid) {
            self.close(id, end);
        }
    }

    /// The connections of a host that lost its power: nobody says so.
    pub fn silence(&mut self, pid: Pid) {
        for (id, end) in self.net.of(pid) {
            let at = self.now + self.dice.net.range(SILENCE / 4..SILENCE);
            if let Some(conn) = self.net.conns.get_mut(&id) {
                conn.open[end] = false;
                conn.flows[end].queue.clear();
            }
            self.at(at, Happening::Lost { conn: id, end: 1 - end });
        }
    }

    /// Cuts the way from `a` to `b` for a time. What lasts longer than the silence sockets bear is the end of their connections.
    pub fn cut(&mut self, a: HostId, b: HostId, lasting: Micros) {
        let until = self.now + lasting;
        self.net.cuts.insert((a, b), until);
        if lasting > SILENCE {
            for id in self.net.between_hosts() {
                let ends = self.net.conns[&id].ends;
                if [(a, b), (b, a)].contains(&(ends[0].0, ends[1].0)) {
                    for end in 0..2 {
                        let at = self.now + SILENCE + self.dice.net.range(0..SILENCE / 4);
                        self.at(at, Happening::Silent { conn: id, end, cut: (a, b) });
                    }
                }
            }
        }
    }

    /// A socket has waited long enough, if the cut is still there.
    pub fn silent(&mut self, id: ConnId, end: usize, cut: (HostId, HostId)) {
        if self.net.cut_until(cut.0, cut.1, self.now) > 0 {
            self.lose(id, end);
        }
    }

    /// A reset seen by one end at once; by the other with the next packet or keep-alive.
    pub fn reset(&mut self, id: ConnId, end: usize) {
        let later = self.now + self.dice.net.range(0..6_000_000);
        self.lose(id, end);
        self.at(later, Happening::Lost { conn: id, end: 1 - end });
    }
}
