//! Connecting a source to its target, for the first time and again after a connection was lost, as `compute::migrate::source` does.
//!
//! Lives here: calling in all roles of an epoch, what is done when that fails, going on with the streams. Never enters: whether to.

use vmove_mirror::{
    block,
    source::Event,
    wire::{
        control::Arrived,
        hello::{Hello, HelloAnswer, Role},
    },
};

use super::{
    super::{
        Pid,
        net::{ConnId, Packet},
        world::{Happening, World},
    },
    Process,
    pages::PagesOut,
    source::{Blocked, SourceMove},
};

/// How long a connection may take to be answered (`HANDSHAKE`).
const HANDSHAKE: u64 = 10_000_000;
/// How long the target is called again (`PATIENCE`).
const PATIENCE: u64 = 60_000_000;
/// How long a host may refuse every connection (`REFUSED`).
const REFUSED: u64 = 5_000_000;
/// First gap between two attempts; it doubles.
const FIRST_GAP: u64 = 100_000;
/// Largest gap between two attempts.
const LAST_GAP: u64 = 2_000_000;

/// Connections being made.
#[derive(Debug, Default)]
pub struct Dial {
    /// The one that awaits its answer.
    pub conn: Option<ConnId>,
    /// Those that are there: control, pages, disks.
    pub links: Vec<ConnId>,
    /// They are made anew.
    again: Option<Again>,
}

#[derive(Debug)]
struct Again {
    began: u64,
    gap: u64,
    /// Since when every connection is refused.
    refused: Option<u64>,
}

impl World {
    fn dialing(&mut self, pid: Pid) -> Option<(&mut SourceMove, Dial)> {
        let mv = self.process(pid)?.source.as_deref_mut()?;
        let dial = mv.dial.take()?;
        Some((mv, dial))
    }

    /// Calls the target in the next role, or is connected.
    pub fn dial_next(&mut self, pid: Pid) {
        let Some(host) = self.host_of(pid) else { return };
        let pages = self.shape.pages;
        let Some((mv, mut dial)) = self.dialing(pid) else { return };
        let Some((to, listener, ticket)) = mv.order.to else { return };
        let role = match dial.links.len() {
            0 => Role::Control,
            1 => Role::Pages(0),
            n if n < 2 + mv.order.copies.len() => Role::Disk((n - 2) as u8),
            _ if dial.again.is_some() => {
                mv.made = Some(dial.links);
                return self.post_source(pid, Event::Connected);
            }
            _ => {
                mv.control = Some(dial.links[0]);
                mv.pages = Some(PagesOut::new(dial.links[1], pages));
                mv.links = dial.links.split_off(2);
                let open = dial.links.iter().all(|conn| self.net.is_open(*conn, 0));
                self.source_goes_on(pid);
                self.post_source(pid, Event::Connected);
                if !open {
                    self.post_source(pid, Event::LinkLost("lost at once".into()));
                }
                return;
            }
        };
        let epoch = mv.epoch;
        let conn = self.dial((host, pid), (to, listener), role);
        dial.conn = Some(conn);
        if let Some(Process { source: Some(mv), .. }) = self.process(pid) {
            mv.dial = Some(dial);
        }
        self.send(conn, 0, Packet::Hello(Hello::new(role, ticket, epoch).encode()));
        self.after(HANDSHAKE, Happening::ConnectTimeout { pid, conn });
    }

    /// The target's answer to a hello.
    pub fn source_answered(&mut self, pid: Pid, conn: ConnId, answer: &[u8; 16]) {
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let Some(dial) = mv.dial.as_mut().filter(|dial| dial.conn == Some(conn)) else { return };
        dial.conn = None;
        match HelloAnswer::decode(answer) {
            Ok(_) => {
                dial.links.push(conn);
                self.dial_next(pid);
            }
            Err(error) => {
                self.close(conn, 0);
                self.dial_failed(pid, error.to_string(), false);
            }
        }
    }

    /// A connection was not answered in time.
    pub fn connect_timeout(&mut self, pid: Pid, conn: ConnId) {
        if self.is_dialing(pid, conn) {
            self.close(conn, 0);
            self.dial_failed(pid, "no answer".into(), false);
        }
    }

    /// Whether a connection awaits its answer.
    pub fn is_dialing(&mut self, pid: Pid, conn: ConnId) -> bool {
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return false };
        mv.dial.as_ref().is_some_and(|dial| dial.conn == Some(conn))
    }

    /// The first connections cannot be made: that ends the move. Others are tried for some time.
    pub fn dial_failed(&mut self, pid: Pid, why: String, refused: bool) {
        let now = self.now;
        let Some((mv, dial)) = self.dialing(pid) else { return };
        let Dial { links, again, .. } = dial;
        if let Some(mut again) = again {
            again.refused = if refused { again.refused.or(Some(now)) } else { None };
            let gone = again.refused.is_some_and(|since| now > since + REFUSED);
            let gap = again.gap;
            again.gap = (gap * 2).min(LAST_GAP);
            if gone || now + gap > again.began + PATIENCE {
                self.post_source(pid, Event::GaveUp(why));
            } else {
                mv.epoch += 1;
                mv.dial = Some(Dial { again: Some(again), ..Dial::default() });
                self.after(gap, Happening::Redial(pid));
            }
        } else {
            debug_assert_eq!(mv.blocked, Some(Blocked::Connecting));
            self.source_goes_on(pid);
            self.post_source(pid, Event::Failed(format!("connect: {why}")));
        }
        for conn in links {
            self.close(conn, 0);
        }
    }

    /// The next attempt is due.
    pub fn redial(&mut self, pid: Pid) {
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        if mv.dial.as_ref().is_some_and(|dial| dial.conn.is_none() && dial.links.is_empty()) {
            self.dial_next(pid);
        }
    }

    /// Ends all connections and has them made anew.
    pub fn source_reconnects(&mut self, pid: Pid) {
        let now = self.now;
        let disks = self.shape.disks.len();
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let mut old: Vec<ConnId> = mv.links.drain(..).collect();
        old.extend(mv.made.take().into_iter().flatten());
        old.extend(mv.control.take());
        old.extend(mv.pages.as_mut().and_then(PagesOut::away));
        mv.awaiting_word = None;
        mv.epoch += 1;
        mv.dial = Some(Dial {
            again: Some(Again { began: now, gap: FIRST_GAP, refused: None }),
            ..Dial::default()
        });
        for disk in 0..disks {
            self.mirror_told(pid, disk, block::Event::TargetAway);
            self.close_tap(pid, disk);
        }
        for conn in old {
            self.close(conn, 0);
        }
        self.after(1, Happening::Redial(pid));
    }

    /// Connections made anew are taken: the control connection is listened to.
    pub fn take_control(&mut self, pid: Pid) {
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let Some(control) = mv.made.as_ref().and_then(|made| made.first().copied()) else { return };
        mv.control = Some(control);
        mv.control_lost = false;
        if !self.net.is_open(control, 0) {
            self.post_source(pid, Event::LinkLost("the control connection".into()));
        }
    }

    /// Goes on with the streams from what the target has.
    pub fn restore_streams(&mut self, pid: Pid, arrived: &Arrived) -> Result<Event, String> {
        let now = self.now;
        let disks: Vec<usize> =
            (0..self.shape.disks.len()).filter(|disk| self.mirror_of(pid, *disk).is_some()).collect();
        if arrived.operations.len() != disks.len() {
            return Err(format!(
                "the target speaks of {} disks, not of {}",
                arrived.operations.len(),
                disks.len()
            ));
        }
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return Err("gone".into()) };
        let (Some(mut made), Some(pages)) = (mv.made.take(), &mut mv.pages) else {
            return Err("there are no new connections".into());
        };
        let links = made.split_off(2);
        let stream = made[1];
        let (lost, bytes) = pages.go_on(stream, arrived.frames).map_err(|e| e.to_string())?;
        pages.heard = now;
        if disks.is_empty() {
            mv.links = links;
        } else {
            // Copied disks are in the order of their connections.
            for ((disk, conn), operations) in disks.into_iter().zip(links).zip(&arrived.operations) {
                let Some(tap) = self.mirror_of(pid, disk) else { continue };
                tap.ledger.roll_back(*operations).map_err(|e| e.to_string())?;
                (tap.sent, tap.answered) = (*operations, *operations);
                tap.conn = Some(conn);
                tap.heard = now;
                self.mirror_told(pid, disk, block::Event::TargetBack { arrived: *operations });
                if !self.net.is_open(conn, 0) {
                    self.disk_away(pid, disk, Event::LinkLost("a block stream".into()));
                }
            }
        }
        if !self.net.is_open(stream, 0) {
            self.post_source(pid, Event::LinkLost("the page stream".into()));
        }
        Ok(Event::Restored { lost, bytes })
    }

    /// A connection of the source is gone.
    pub fn source_lost(&mut self, pid: Pid, role: Role, conn: ConnId, why: Event) {
        if self.is_dialing(pid, conn) {
            return self.dial_failed(pid, "the connection was refused".into(), true);
        }
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        match role {
            Role::Control if mv.control == Some(conn) => {
                mv.control_lost = true;
                self.post_source(pid, why);
            }
            Role::Pages(_) if mv.pages.as_ref().is_some_and(|pages| pages.conn == Some(conn)) => {
                self.post_source(pid, why);
            }
            Role::Disk(_) => {
                if let Some(disk) = self.disk_of(pid, conn) {
                    self.disk_away(pid, disk, why);
                }
            }
            _ => {}
        }
    }
}
