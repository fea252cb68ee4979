//! A NIC's thread: moves packets while it may, answers commands, announces the guest when told.
//!
//! What lives here: when packets are moved, and the waiting. What never enters: how (`receive`, `transmit`, `control`).

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::control::Control;
use super::handle::{Command, Standing, Started};
use super::receive::Receive;
use super::transmit::Transmit;
use super::{Backend, MAX_PACKET, MacAddress, Offloads, announce};
use crate::virtio::{DeviceQueue, Interrupt, RingError};

const EVENT_COMMAND: u64 = 0;
const EVENT_WIRE: u64 = 1;
/// Plus the number of the queue.
const EVENT_KICK: u64 = 2;

/// Queue numbers without multiqueue (virtio 1.2 section 5.1.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Packets moved in one direction before anything else has its turn.
const BUDGET: usize = 64;
/// Most packets thrown away at a time: more than a tap's queue holds.
const STALE: usize = 8192;

/// What the guest reads of its link, shared with the device's registers.
#[derive(Default)]
pub struct Link {
    /// The guest is asked to announce itself and has not said yet that it has.
    announce: AtomicBool,
}

impl Link {
    /// Whether the guest is asked to announce itself.
    pub fn wants_announcement(&self) -> bool {
        self.announce.load(Ordering::Acquire)
    }

    /// The guest has announced itself, or is a new one.
    pub fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }
}

/// The thread's state.
pub struct Worker {
    name: String,
    mac: MacAddress,
    /// None once it has let go.
    wire: Option<Box<dyn Backend>>,
    link: Arc<Link>,
    commands: Receiver<Command>,
    wake: EventFd,
    epoll: Epoll,
    active: Option<Active>,
    paused: bool,
    /// The next frame of an announcement, and its time.
    announcing: Option<(u32, Instant)>,
}

/// The queues being served.
struct Active {
    receive: Option<Receive>,
    transmit: Option<Transmit>,
    control: Option<Control>,
    kicks: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
    /// The guest can announce itself.
    announces: bool,
}

impl Worker {
    pub fn new(
        name: &str,
        mac: MacAddress,
        wire: Box<dyn Backend>,
        link: Arc<Link>,
        commands: Receiver<Command>,
        wake: &EventFd,
    ) -> io::Result<Self> {
        let wake = wake.try_clone()?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, EVENT_COMMAND))?;
        // Edges only: a wire whose packets the guest has no room for must not keep the thread busy. What an edge said is
        // remembered by trying again whenever anything happens.
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let fd = wire.file().as_raw_fd();
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(edges, EVENT_WIRE))?;
        Ok(Self {
            name: name.to_owned(),
            mac,
            wire: Some(wire),
            link,
            commands,
            wake,
            epoll,
            active: None,
            paused: false,
            announcing: None,
        })
    }

    pub fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(nic = self.name, %error, "the NIC's thread ends");
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 8];
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.until_announcement() };
            let count = match self.epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            for event in &events[..count] {
                match event.data() {
                    EVENT_COMMAND => {
                        // Only takes the count back; the channel says what there is to do.
                        let _ = self.wake.read();
                        loop {
                            match self.commands.try_recv() {
                                Ok(command) => self.handle(command)?,
                                Err(TryRecvError::Empty) => break,
                                Err(TryRecvError::Disconnected) => return Ok(()),
                            }
                        }
                    }
                    EVENT_WIRE => {}
                    kick => {
                        // The same; the ring says what there is to do.
                        let index = (kick - EVENT_KICK) as usize;
                        let _ = self.active.as_ref().and_then(|a| a.kicks.get(index)).map(EventFd::read);
                    }
                }
            }
            self.announce_if_due();
            more = self.pump();
        }
    }

    /// Replies go to a thread that may have gone; then nobody wants them, and dropping the error is right.
    fn handle(&mut self, command: Command) -> io::Result<()> {
        match command {
            Command::Start(started) => self.start(started)?,
            Command::Finish { reply } => {
                self.finish()?;
                let _ = reply.send(());
            }
            Command::Look { reply } => {
                let _ = reply.send(self.active.as_ref().map(Active::standing).unwrap_or_default());
            }
            // Packets are moved one at a time on this thread: none is half-way now.
            Command::Pause { reply } => {
                self.paused = true;
                let _ = reply.send(());
            }
            Command::Resume => self.paused = false,
            Command::Announce => {
                self.announcing = None;
                self.announce(0);
            }
            Command::Leave { reply } => {
                self.announcing = None;
                if let Some(wire) = self.wire.take() {
                    self.epoll.ctl(
                        ControlOperation::Delete,
                        wire.file().as_raw_fd(),
                        EpollEvent::default(),
                    )?;
                }
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    fn start(&mut self, started: Started) -> io::Result<()> {
        let Started { features, queues, interrupt, pending } = started;
        let has = |bit: u32| features & 1 << bit != 0;
        if let Some(wire) = &mut self.wire {
            // What has come so far was for a guest that did not listen yet; on the way from another host, for one that
            // received it there.
            throw_away(&**wire);
            let offloads = Offloads::taken_by_guest(features);
            if let Err(error) = wire.set_offloads(offloads) {
                tracing::error!(nic = self.name, %error, ?offloads, "the wire refuses what it has offered");
                interrupt.needs_reset();
                return Ok(());
            }
        }
        let mut active = Active {
            receive: None,
            transmit: None,
            control: None,
            kicks: Vec::new(),
            interrupt,
            announces: [VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_STATUS]
                .into_iter()
                .all(has),
        };
        for (kick, queue) in queues {
            let event = EpollEvent::new(EventSet::IN, EVENT_KICK + active.kicks.len() as u64);
            self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)?;
            active.kicks.push(kick);
            match queue.index() {
                RECEIVE => {
                    let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
                    active.receive = Some(Receive::new(queue, mergeable, pending.as_deref()));
                }
                TRANSMIT => active.transmit = Some(Transmit::new(queue)),
                _ => active.control = Some(Control::new(queue, Arc::clone(&self.link))),
            }
        }
        self.active = Some(active);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.announcing = None;
        self.link.announced();
        for kick in self.active.take().iter().flat_map(|active| &active.kicks) {
            self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default())?;
        }
        Ok(())
    }

    /// Moves packets. True if there may be more.
    fn pump(&mut self) -> bool {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else { return false };
        let mut more = false;
        if let Some(wire) = &self.wire {
            if let Some(receive) = &mut active.receive {
                let pumped = receive.pump(wire.file(), BUDGET);
                more |= unless_broken(pumped, receive.queue());
            }
            if let Some(transmit) = &mut active.transmit {
                let pumped = transmit.pump(wire.file(), BUDGET);
                more |= unless_broken(pumped, transmit.queue());
            }
        }
        if let Some(control) = &mut active.control {
            let pumped = control.pump(BUDGET);
            more |= unless_broken(pumped, control.queue());
        }
        more
    }

    /// Milliseconds until the announcement goes on; -1 for never.
    fn until_announcement(&self) -> i32 {
        match self.announcing.filter(|_| !self.paused) {
            // Rounded up: woken too early it would be woken over and over.
            Some((_, at)) => at.saturating_duration_since(Instant::now()).as_millis() as i32 + 1,
            None => -1,
        }
    }

    fn announce_if_due(&mut self) {
        if let Some((round, _)) = self.announcing.filter(|(_, at)| !self.paused && *at <= Instant::now()) {
            self.announce(round);
        }
    }

    fn announce(&mut self, round: u32) {
        let Some(wire) = &self.wire else { return };
        if let Err(error) = io::Write::write(&mut wire.file(), &announce::frame(self.mac)) {
            tracing::warn!(nic = self.name, %error, round, "the guest's place is not announced");
        }
        if let Some(active) = self.active.as_ref().filter(|active| active.announces) {
            self.link.announce.store(true, Ordering::Release);
            active.interrupt.config_changed();
        }
        self.announcing = announce::gap_after(round).map(|gap| (round + 1, Instant::now() + gap));
    }
}

impl Active {
    fn standing(&self) -> Standing {
        let positions = [
            self.receive.as_ref().map(Receive::position),
            self.transmit.as_ref().map(Transmit::position),
            self.control.as_ref().map(Control::position),
        ];
        Standing {
            positions: positions.into_iter().flatten().collect(),
            pending: self.receive.as_ref().and_then(Receive::pending),
        }
    }
}

/// Gives up on a queue that cannot be served; else passes on whether there is more to do.
fn unless_broken(pumped: Result<bool, RingError>, queue: &mut DeviceQueue) -> bool {
    pumped.unwrap_or_else(|error| {
        queue.give_up(&error);
        false
    })
}

/// Takes what waits on the wire and forgets it.
fn throw_away(wire: &dyn Backend) {
    let mut packet = vec![0; MAX_PACKET];
    for _ in 0..STALE {
        if !matches!(wire.file().read(&mut packet), Ok(1..)) {
            return;
        }
    }
}
