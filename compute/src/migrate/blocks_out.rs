//! The mirror of one disk at the source: the tap between the guest's writes and its image, the background copy, the block stream.
//!
//! Lives here: carrying out what `vmove_mirror::block` decides, on the disk's own thread. Never enters: which range when.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    ops::Range,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::LocalBoxFuture;
use vm_memory::Bytes;
use vmove_devices::disk::{DiskContext, DiskHandle, GuestSlice, WriteTap, ZeroKind};
use vmove_mirror::{
    block::{Action, BlockMirror, Content, Event, GuestOp, OpId, Piece, State, Stats},
    digest::{BlockChain, checksum},
    source,
    wire::{
        blocks::{BlockAck, BlockHead, BlockOp, MAX_WRITE},
        frame::Kind,
    },
};
use vmove_storage::{AlignedBuf, BlockDevice, BlockError, BlockStatus, Ring};

use super::{
    MoveError, audit,
    inbox::{Inbox, Outbox},
    link::{Link, LinkCloser, LinkReceiver, LinkSender},
    pace::Pace,
    signal::Signal,
};
use crate::memory::is_zero;

/// Bytes looked at together when zeroes are cut out of copied data.
const ZERO_UNIT: usize = 4096;

/// What went over a block stream, as one side saw it.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlocksProof {
    /// BLAKE3 chain over all operations.
    pub digest: [u8; 32],
    /// Operations.
    pub ops: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// The chain and counters behind a [`BlocksProof`].
#[derive(Debug, Default)]
pub struct BlocksTally {
    chain: BlockChain,
    ops: u64,
    bytes: u64,
}

impl BlocksTally {
    /// Counts an operation; `frame` is its encoded head.
    pub fn add(&mut self, frame: &[u8], bytes: u64) {
        self.chain.add(frame);
        self.ops += 1;
        self.bytes += bytes;
    }

    /// The proof so far.
    pub fn proof(&self) -> BlocksProof {
        BlocksProof { digest: self.chain.digest(), ops: self.ops, bytes: self.bytes }
    }
}

enum Command {
    Acked(BlockAck),
    Lost,
    Drain,
    Audit(Sender<Result<[u8; 32], BlockError>>),
    Detach(Sender<()>),
}

struct Item {
    head: BlockHead,
    data: Option<(Arc<AlignedBuf>, Range<usize>)>,
}

/// Handle of a disk's mirror; dropping it takes the mirror out of the guest's way.
pub struct BlocksOut {
    name: String,
    commands: Inbox<Command>,
    closer: LinkCloser,
    tally: Arc<Mutex<BlocksTally>>,
    stats: Arc<Mutex<Stats>>,
    waiting: Waiting,
}

/// Guest operations that wait for both images, and since when.
type Waiting = Arc<Mutex<BTreeMap<u64, Instant>>>;

impl BlocksOut {
    /// Puts a mirror on `disk` (number `index` of the plan) and starts copying to the target behind `link`.
    pub fn start(
        disk: &DiskHandle,
        index: usize,
        link: Link,
        pace: Arc<Pace>,
        events: Sender<source::Event>,
    ) -> Result<Self, MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("block stream"))?;
        let (commands, outbox) = Inbox::new().map_err(MoveError::io("create an event"))?;
        let (wire, items) = mpsc::channel();
        let tally = Arc::new(Mutex::new(BlocksTally::default()));
        let stats = Arc::new(Mutex::new(Stats::default()));
        let thread = |name: &str| thread::Builder::new().name(format!("{name}-{}", disk.name()));
        let (lost, shared) = (commands.clone(), Arc::clone(&tally));
        thread("blocks-out")
            .spawn(move || {
                if let Err(error) = send_items(sender, &items, &pace, &shared) {
                    tracing::warn!(%error, "block stream");
                    lost.put(Command::Lost);
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        let acks = commands.clone();
        thread("blocks-acks")
            .spawn(move || read_acks(receiver, &acks))
            .map_err(MoveError::io("start a thread"))?;
        let shared = Arc::clone(&stats);
        let waiting = Waiting::default();
        let pending = Arc::clone(&waiting);
        let size = disk.size();
        disk.run(Box::new(move |context| {
            Box::pin(async move {
                let tap = Rc::new(Tap {
                    index,
                    mirror: RefCell::new(BlockMirror::new(size)),
                    device: context.path().device(),
                    ring: Rc::clone(context.ring()),
                    guests: RefCell::default(),
                    copies: RefCell::default(),
                    next_guest: Cell::new(0),
                    wire,
                    events,
                    stats: shared,
                    waiting: pending,
                });
                tap.serve(&context, &outbox).await;
            })
        }))
        .map_err(|e| MoveError::Machine(e.to_string()))?;
        Ok(Self { name: disk.name().to_owned(), commands, closer, tally, stats, waiting })
    }

    /// No guest write will come any more: bring the target to the end and flush it.
    pub fn drain(&self) {
        self.commands.put(Command::Drain);
    }

    /// What was sent so far.
    pub fn proof(&self) -> BlocksProof {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).proof()
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
        self.closer.close();
    }
}

impl Drop for BlocksOut {
    fn drop(&mut self) {
        self.closer.close();
    }
}

fn send_items(
    mut link: LinkSender,
    items: &Receiver<Item>,
    pace: &Pace,
    tally: &Mutex<BlocksTally>,
) -> Result<(), MoveError> {
    while let Ok(Item { mut head, data }) = items.recv() {
        let data = data.as_ref().map_or(&[][..], |(buffer, range)| &buffer.as_slice()[range.clone()]);
        if let BlockOp::Write { sum } = &mut head.op {
            *sum = checksum(data);
        }
        let frame = head.encode().map_err(MoveError::wire("block frame"))?;
        tally.lock().unwrap_or_else(PoisonError::into_inner).add(&frame, data.len() as u64);
        pace.take((frame.len() + data.len()) as u64);
        link.send(&[&frame, data]).map_err(MoveError::io("send blocks"))?;
    }
    Ok(())
}

fn read_acks(mut receiver: LinkReceiver, commands: &Inbox<Command>) {
    loop {
        let ack = receiver.frame().and_then(|(header, head)| match header.kind {
            Kind::BlockAck => BlockAck::decode(&head).map_err(MoveError::wire("block stream")),
            _ => Err(MoveError::Machine("the target sent something else than acknowledgements".into())),
        });
        let message = ack.map_or(Command::Lost, Command::Acked);
        let lost = matches!(message, Command::Lost);
        if !commands.put(message) || lost {
            return;
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
    mirror: RefCell<BlockMirror>,
    device: Rc<BlockDevice>,
    ring: Rc<Ring>,
    guests: RefCell<HashMap<u64, Rc<Guest>>>,
    copies: RefCell<HashMap<u64, (u64, Arc<AlignedBuf>)>>,
    next_guest: Cell<u64>,
    wire: Sender<Item>,
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
                Command::Acked(ack) => self.step(Event::Acked { seq: ack.seq, done: ack.done }),
                Command::Lost => self.step(Event::TargetLost),
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
                Ok(_) => return self.fail("its allocation map ends early".into()),
                Err(error) => return self.fail(format!("its allocation map cannot be read: {error}")),
            }
        }
        self.step(Event::Mapped);
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
                    // A sender that has ended reports the loss itself.
                    let _ = self.wire.send(Item { head: BlockHead { seq, op, offset, len }, data });
                }
                Action::Copy { id, offset, len } => {
                    let tap = Rc::clone(self);
                    self.ring.spawn(async move { tap.copy(id, offset, len).await });
                }
                Action::CopyDone { id } => drop(self.copies.borrow_mut().remove(&id)),
                Action::Report(state) => {
                    if state == State::Failed {
                        tracing::warn!(disk = self.index, "the mirror has failed; the guest goes on alone");
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
                tracing::warn!(%error, offset, "cannot read for the copy");
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
