//! The mirror of one disk at the source: the tap between the guest's writes and its image, the background copy, the block stream.
//!
//! The tap stays for the whole move; the stream's threads end with their connection and begin anew with the next.
//! Lives here: carrying out what `vmove_mirror::block` decides, on the disk's own thread. Never enters: which range when.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    ops::Range,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures_util::future::LocalBoxFuture;
use vm_memory::Bytes;
use vmove_devices::disk::{DiskContext, DiskHandle, GuestSlice, WriteTap, ZeroKind};
use vmove_mirror::{
    block::{Action, BlockMirror, Content, Event, GuestOp, OpId, Piece, State, Stats},
    digest::checksum,
    ledger::{BlocksLedger, BlocksProof},
    source,
    wire::{
        blocks::{BlockAck, BlockHead, BlockOp, MAX_WRITE},
        frame::Kind,
    },
};
use vmove_storage::{AlignedBuf, BlockDevice, BlockError, BlockStatus, Ring};

use super::{
    MoveError, audit, disk_trouble,
    inbox::{Inbox, Outbox},
    link::{Link, LinkCloser, LinkReceiver, LinkSender},
    pace::Pace,
    signal::Signal,
};
use crate::memory::is_zero;

/// Bytes looked at together when zeroes are cut out of copied data.
const ZERO_UNIT: usize = 4096;

enum Command {
    Acked(BlockAck),
    /// The connection is gone.
    Away,
    /// There is another one.
    Back {
        arrived: u64,
        wire: Sender<Item>,
    },
    Drain,
    Audit(Sender<Result<[u8; 32], BlockError>>),
    Detach(Sender<()>),
}

struct Item {
    head: BlockHead,
    data: Option<(Arc<AlignedBuf>, Range<usize>)>,
}

/// What the stream's threads and the handle share.
struct Stream {
    ledger: BlocksLedger,
    /// When the target was last heard of, or began to owe an answer.
    heard: Instant,
}

/// One connection and the threads on it.
struct Connection {
    closer: LinkCloser,
    threads: [JoinHandle<()>; 2],
}

/// Handle of a disk's mirror; dropping it takes the mirror out of the guest's way.
pub struct BlocksOut {
    name: String,
    commands: Inbox<Command>,
    connection: Mutex<Option<Connection>>,
    stream: Arc<Mutex<Stream>>,
    stats: Arc<Mutex<Stats>>,
    waiting: Waiting,
    pace: Arc<Pace>,
    events: Sender<source::Event>,
}

/// Guest operations that wait for both images, and since when.
type Waiting = Arc<Mutex<BTreeMap<u64, Instant>>>;

impl BlocksOut {
    /// Puts a mirror on `disk` (number `index` of the plan) and starts copying to the target behind `link`, which errors call `to`.
    pub fn start(
        disk: &DiskHandle,
        index: usize,
        (link, to): (Link, String),
        pace: Arc<Pace>,
        events: Sender<source::Event>,
    ) -> Result<Self, MoveError> {
        let (commands, outbox) = Inbox::new().map_err(MoveError::io("create an event"))?;
        let this = Self {
            name: disk.name().to_owned(),
            commands,
            connection: Mutex::default(),
            stream: Arc::new(Mutex::new(Stream { ledger: BlocksLedger::default(), heard: Instant::now() })),
            stats: Arc::default(),
            waiting: Waiting::default(),
            pace,
            events,
        };
        let wire = this.connect(link)?;
        let (stats, waiting, events) =
            (Arc::clone(&this.stats), Arc::clone(&this.waiting), this.events.clone());
        let (size, name) = (disk.size(), disk.name().to_owned());
        disk.run(Box::new(move |context| {
            Box::pin(async move {
                let tap = Rc::new(Tap {
                    index,
                    name,
                    to,
                    trouble: RefCell::default(),
                    mirror: RefCell::new(BlockMirror::new(size)),
                    device: context.path().device(),
                    ring: Rc::clone(context.ring()),
                    guests: RefCell::default(),
                    copies: RefCell::default(),
                    next_guest: Cell::new(0),
                    wire: RefCell::new(Some(wire)),
                    events,
                    stats,
                    waiting,
                });
                tap.serve(&context, &outbox).await;
            })
        }))
        .map_err(|e| MoveError::Machine(e.to_string()))?;
        Ok(this)
    }

    /// Starts the stream's threads on a connection; gives what feeds them.
    fn connect(&self, link: Link) -> Result<Sender<Item>, MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("block stream"))?;
        let (wire, items) = mpsc::channel();
        self.lock().heard = Instant::now();
        let thread = |name: &str| thread::Builder::new().name(format!("{name}-{}", self.name));
        let (stream, pace) = (Arc::clone(&self.stream), Arc::clone(&self.pace));
        let (away, events) = (self.commands.clone(), self.events.clone());
        let out = thread("blocks-out")
            .spawn(move || {
                if let Err(error) = send_items(sender, &items, &pace, &stream) {
                    away.put(Command::Away);
                    let _ = events.send(error.into_source_event());
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        let (stream, commands, events) =
            (Arc::clone(&self.stream), self.commands.clone(), self.events.clone());
        let acks = thread("blocks-acks")
            .spawn(move || {
                if let Err(error) = read_acks(receiver, &commands, &stream) {
                    commands.put(Command::Away);
                    let _ = events.send(error.into_source_event());
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        let connection = Connection { closer, threads: [out, acks] };
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(wire)
    }

    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection is gone, or is to be: the guest goes on alone meanwhile.
    pub fn away(&self) {
        self.commands.put(Command::Away);
        self.close();
    }

    /// Waits for the threads of a connection that was ended by [`BlocksOut::away`].
    pub fn end_connection(&self) {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner).take();
        for thread in connection.into_iter().flat_map(|connection| connection.threads) {
            if thread.join().is_err() {
                tracing::error!(disk = self.name, "a thread of the block stream has panicked");
            }
        }
    }

    /// Goes on over another connection, whose target has `arrived` operations. The last one has ended.
    pub fn go_on(&self, link: Link, arrived: u64) -> Result<(), MoveError> {
        let rolled_back = self.lock().ledger.roll_back(arrived);
        rolled_back.map_err(|e| MoveError::Machine(format!("disk {}: {e}", self.name)))?;
        let wire = self.connect(link)?;
        self.commands.put(Command::Back { arrived, wire });
        Ok(())
    }

    /// No guest write will come any more: bring the target to the end and flush it.
    pub fn drain(&self) {
        self.commands.put(Command::Drain);
    }

    /// What was sent so far.
    pub fn proof(&self) -> BlocksProof {
        self.lock().ledger.proof()
    }

    /// Counters so far.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the oldest guest operation has been waiting.
    pub fn stalled(&self) -> Option<Duration> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.first_key_value().map(|(_, since)| since.elapsed())
    }

    /// How long the target has owed an answer without giving any.
    pub fn silent(&self) -> Option<Duration> {
        let stream = self.lock();
        (stream.ledger.unacked() > 0).then(|| stream.heard.elapsed())
    }

    /// BLAKE3 of the whole disk, read now.
    pub fn audit(&self) -> Result<[u8; 32], MoveError> {
        let (reply, digest) = mpsc::channel();
        self.commands.put(Command::Audit(reply));
        let gone = |_| MoveError::Machine(format!("the thread of disk {} has ended", self.name));
        digest.recv().map_err(gone)?.map_err(MoveError::disk(&self.name))
    }

    /// Takes the mirror out of the guest's way and waits until it is.
    pub fn detach(&self) {
        let (reply, done) = mpsc::channel();
        if self.commands.put(Command::Detach(reply)) {
            let _ = done.recv();
        }
        self.close();
    }

    fn close(&self) {
        if let Some(connection) = &*self.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            connection.closer.close();
        }
    }
}

impl Drop for BlocksOut {
    fn drop(&mut self) {
        self.close();
    }
}

fn send_items(
    mut link: LinkSender,
    items: &Receiver<Item>,
    pace: &Pace,
    stream: &Mutex<Stream>,
) -> Result<(), MoveError> {
    while let Ok(Item { mut head, data }) = items.recv() {
        let data = data.as_ref().map_or(&[][..], |(buffer, range)| &buffer.as_slice()[range.clone()]);
        if let BlockOp::Write { sum } = &mut head.op {
            *sum = checksum(data);
        }
        let frame = head.encode().map_err(MoveError::wire("block frame"))?;
        pace.take((frame.len() + data.len()) as u64);
        {
            let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            if stream.ledger.unacked() == 0 {
                stream.heard = Instant::now();
            }
            // Before a byte of it is sent: from then on it may arrive.
            stream.ledger.sent(&frame, data.len() as u64);
        }
        link.send(&[&frame, data]).map_err(MoveError::io("send blocks"))?;
    }
    Ok(())
}

/// Reads acknowledgements until the connection or the mirror ends.
fn read_acks(
    mut receiver: LinkReceiver,
    commands: &Inbox<Command>,
    stream: &Mutex<Stream>,
) -> Result<(), MoveError> {
    loop {
        let (header, head) = receiver.frame()?;
        if header.kind != Kind::BlockAck {
            return Err(MoveError::Machine("the target sent something else than acknowledgements".into()));
        }
        let ack = BlockAck::decode(&head).map_err(MoveError::wire("block stream"))?;
        {
            let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            stream.heard = Instant::now();
            stream.ledger.acked(ack.seq).map_err(|e| MoveError::Machine(e.to_string()))?;
        }
        if !commands.put(Command::Acked(ack)) {
            return Ok(());
        }
    }
}

/// One guest operation under the mirror.
struct Guest {
    start: Signal,
    finished: Signal,
    data: Option<Arc<AlignedBuf>>,
}

/// The mirror on the disk's thread.
struct Tap {
    index: usize,
    name: String,
    to: String,
    /// The first thing that went wrong since all was well.
    trouble: RefCell<Option<String>>,
    mirror: RefCell<BlockMirror>,
    device: Rc<BlockDevice>,
    ring: Rc<Ring>,
    guests: RefCell<HashMap<u64, Rc<Guest>>>,
    copies: RefCell<HashMap<u64, (u64, Arc<AlignedBuf>)>>,
    next_guest: Cell<u64>,
    /// None while the target is away.
    wire: RefCell<Option<Sender<Item>>>,
    events: Sender<source::Event>,
    stats: Arc<Mutex<Stats>>,
    waiting: Waiting,
}

impl Tap {
    async fn serve(self: Rc<Self>, context: &DiskContext, outbox: &Outbox<Command>) {
        let quiet = context.quiesce().await;
        context.path().set_tap(&quiet, Some(Rc::new(Entrance(Rc::clone(&self)))));
        drop(quiet);
        let mapper = Rc::clone(&self);
        self.ring.spawn(async move { mapper.map().await });
        while let Some(command) = outbox.next(&self.ring).await {
            match command {
                Command::Acked(ack) => {
                    if let Err(failure) = ack.result {
                        let place = self.mirror.borrow().place_of(ack.seq);
                        self.note(disk_trouble::at_target(&self.name, &self.to, place, failure));
                    }
                    self.step(Event::Acked { seq: ack.seq, done: ack.result.is_ok() });
                }
                Command::Away => {
                    self.step(Event::TargetAway);
                    // The stream's thread ends when nothing feeds it.
                    *self.wire.borrow_mut() = None;
                }
                Command::Back { arrived, wire } => {
                    *self.wire.borrow_mut() = Some(wire);
                    self.step(Event::TargetBack { arrived });
                }
                Command::Drain => self.step(Event::Drain),
                Command::Audit(reply) => {
                    let _ = reply.send(audit::disk(&self.device).await);
                }
                Command::Detach(reply) => {
                    self.leave(context).await;
                    let _ = reply.send(());
                    return;
                }
            }
        }
        // Nobody holds the handle any more.
        self.leave(context).await;
    }

    async fn leave(self: &Rc<Self>, context: &DiskContext) {
        self.step(Event::TargetLost);
        *self.wire.borrow_mut() = None;
        let quiet = context.quiesce().await;
        context.path().set_tap(&quiet, None);
    }

    /// Tells the mirror where the image holds data.
    async fn map(self: Rc<Self>) {
        let size = self.device.size();
        let mut at = 0;
        while at < size {
            match self.device.block_status(at, size - at).await {
                Ok((status, len)) if len > 0 => {
                    let len = len.min(size - at);
                    if status == BlockStatus::Data {
                        self.step(Event::Allocated { offset: at, len });
                    }
                    at += len;
                }
                Ok(_) => return self.fail(format!("disk {}: its allocation map ends early", self.name)),
                Err(error) => return self.fail(disk_trouble::at_source(&self.name, (at, size - at), &error)),
            }
        }
        self.step(Event::Mapped);
    }

    fn note(&self, trouble: String) {
        tracing::warn!(trouble, "the copy of a disk");
        self.trouble.borrow_mut().get_or_insert(trouble);
    }

    fn fail(&self, why: String) {
        let _ = self.events.send(source::Event::Failed(why));
    }

    fn step(self: &Rc<Self>, event: Event) {
        let (actions, stats) = {
            let mut mirror = self.mirror.borrow_mut();
            (mirror.step(event), mirror.stats())
        };
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        for action in actions {
            match action {
                Action::Local { id } => self.with_guest(id, |guest| guest.start.set()),
                Action::Finish { id, .. } => {
                    self.with_guest(id, |guest| guest.finished.set());
                    self.guests.borrow_mut().remove(&id);
                }
                Action::Send { seq, of, op, offset, len } => {
                    let data = match (op, of) {
                        (BlockOp::Write { .. }, OpId::Guest(id)) => self
                            .guests
                            .borrow()
                            .get(&id)
                            .and_then(|guest| guest.data.clone())
                            .map(|data| (data, 0..len as usize)),
                        (BlockOp::Write { .. }, OpId::Copy(id)) => {
                            self.copies.borrow().get(&id).map(|(start, data)| {
                                let from = (offset - start) as usize;
                                (Arc::clone(data), from..from + len as usize)
                            })
                        }
                        _ => None,
                    };
                    if let Some(wire) = &*self.wire.borrow() {
                        // A sender that has ended reports the loss itself.
                        let _ = wire.send(Item { head: BlockHead { seq, op, offset, len }, data });
                    }
                }
                Action::Copy { id, offset, len } => {
                    let tap = Rc::clone(self);
                    self.ring.spawn(async move { tap.copy(id, offset, len).await });
                }
                Action::CopyDone { id } => drop(self.copies.borrow_mut().remove(&id)),
                Action::Report(state) => {
                    let trouble = match state {
                        State::Failed => {
                            tracing::warn!(
                                disk = self.name,
                                "the mirror has failed; the guest goes on alone"
                            );
                            self.trouble.take()
                        }
                        State::Synced => {
                            self.trouble.take();
                            None
                        }
                        _ => None,
                    };
                    // Before the state, which says only that it failed.
                    if let Some(why) = trouble {
                        self.fail(why);
                    }
                    let _ = self.events.send(source::Event::Disk { index: self.index, state });
                }
            }
        }
    }

    fn with_guest(&self, id: u64, act: impl FnOnce(&Guest)) {
        let guest = self.guests.borrow().get(&id).cloned();
        if let Some(guest) = guest {
            act(&guest);
        }
    }

    /// Carries a guest's operation through the mirror.
    async fn guest(
        self: &Rc<Self>,
        op: GuestOp,
        offset: u64,
        len: u64,
        data: Option<AlignedBuf>,
        may_unmap: bool,
    ) -> Result<(), BlockError> {
        let id = self.next_guest.get();
        self.next_guest.set(id + 1);
        let data = data.map(Arc::new);
        let guest = Rc::new(Guest { start: Signal::default(), finished: Signal::default(), data });
        self.guests.borrow_mut().insert(id, Rc::clone(&guest));
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Instant::now());
        self.step(Event::Guest { id, op, offset, len });
        guest.start.wait().await;
        let done = match (op, &guest.data) {
            (GuestOp::Write, Some(data)) => self.device.write(offset, data.io_vec()).await,
            (GuestOp::Discard, _) => self.device.discard(offset, len).await,
            (GuestOp::Zero | GuestOp::Write, _) => self.device.write_zeroes(offset, len, may_unmap).await,
        };
        self.step(Event::LocalDone { id, ok: done.is_ok() });
        guest.finished.wait().await;
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        done
    }

    async fn copy(self: &Rc<Self>, id: u64, offset: u64, len: u64) {
        match self.read(offset, len).await {
            Ok((data, pieces)) => {
                self.copies.borrow_mut().insert(id, (offset, Arc::new(data)));
                self.step(Event::CopyRead { id, pieces });
            }
            Err(error) => {
                self.note(disk_trouble::at_source(&self.name, (offset, len), &error));
                self.step(Event::CopyFailed { id });
            }
        }
    }

    async fn read(&self, offset: u64, len: u64) -> Result<(AlignedBuf, Vec<Piece>), BlockError> {
        let mut data = AlignedBuf::zeroed(len as usize);
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let (status, run) = self.device.block_status(at, offset + len - at).await?;
            // A status without length would stand still; a sector always has one.
            let run = run.clamp(512, offset + len - at);
            let range = (at - offset) as usize..(at - offset + run) as usize;
            match status {
                BlockStatus::Data => {
                    let part = &mut data.as_mut_slice()[range];
                    self.device.read(at, (&mut *part).into()).await?;
                    for (i, unit) in part.chunks(ZERO_UNIT).enumerate() {
                        let content = if is_zero(unit) { Content::Zero } else { Content::Data };
                        push(&mut pieces, at + (i * ZERO_UNIT) as u64, unit.len() as u64, content);
                    }
                }
                BlockStatus::Zero => push(&mut pieces, at, run, Content::Zero),
                BlockStatus::Hole => push(&mut pieces, at, run, Content::Hole),
            }
            at += run;
        }
        Ok((data, pieces))
    }
}

/// Adds a piece, joined to the one before if that is of the same sort.
fn push(pieces: &mut Vec<Piece>, offset: u64, len: u64, content: Content) {
    match pieces.last_mut() {
        Some(last) if last.content == content && last.offset + last.len == offset => last.len += len,
        _ => pieces.push(Piece { offset, len, content }),
    }
}

/// What the guest's requests meet while a mirror is on the disk.
struct Entrance(Rc<Tap>);

impl WriteTap for Entrance {
    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [GuestSlice<'a>],
    ) -> LocalBoxFuture<'a, Result<(), BlockError>> {
        Box::pin(async move {
            // The guest may change its buffer while it is written: both images must get the same bytes.
            let len: usize = data.iter().map(|slice| slice.len()).sum();
            let mut owned = AlignedBuf::zeroed(len);
            let mut at = 0;
            for slice in data {
                let part = &mut owned.as_mut_slice()[at..at + slice.len()];
                if slice.read_slice(part, 0).is_err() {
                    unreachable!("a slice of {} bytes fills a buffer of {}", slice.len(), part.len());
                }
                at += slice.len();
            }
            if len as u64 <= MAX_WRITE {
                return self.0.guest(GuestOp::Write, offset, len as u64, Some(owned), false).await;
            }
            let mut at = offset;
            for part in owned.as_slice().chunks(MAX_WRITE as usize) {
                let data = AlignedBuf::from_slice(part);
                self.0.guest(GuestOp::Write, at, part.len() as u64, Some(data), false).await?;
                at += part.len() as u64;
            }
            Ok(())
        })
    }

    fn zero(&self, offset: u64, len: u64, kind: ZeroKind) -> LocalBoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move {
            match kind {
                ZeroKind::Zero { may_unmap } => {
                    self.0.guest(GuestOp::Zero, offset, len, None, may_unmap).await
                }
                ZeroKind::Discard => self.0.guest(GuestOp::Discard, offset, len, None, true).await,
            }
        })
    }
}
