//! The block stream at the target: a thread that reads and checks frames, a task on the disk's own thread that applies them.
//!
//! The task stays for the whole move; the threads end with their connection and begin anew with the next.
//! Lives here: applying operations to an image that nothing else uses yet. Never enters: guests, decisions.

use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
};

use vmove_devices::disk::{DiskContext, DiskHandle};
use vmove_mirror::{
    digest::checksum,
    ledger::{BlocksProof, BlocksTally},
    wire::{
        WireError,
        blocks::{BlockAck, BlockHead, BlockOp, Failure},
        frame::Kind,
    },
};
use vmove_storage::{AlignedBuf, BlockDevice, BlockError, OpenOptions};

use super::{
    MoveError, audit,
    inbox::{Inbox, Outbox},
    link::{Link, LinkCloser, LinkReceiver, LinkSender},
    signal::Signal,
};

/// Operations read ahead of the disk at most; the source's own limits stay below it.
const READ_AHEAD: usize = 128;

/// Which image takes the blocks.
pub enum Image {
    /// The one the disk's thread has open: a VM arrives.
    Own,
    /// Another one, that will replace it: a datastore-only move.
    New(PathBuf, OpenOptions),
}

enum Command {
    Apply(BlockHead, Option<AlignedBuf>, Sender<BlockAck>),
    /// Answered when nothing is being applied.
    Idle(Sender<()>),
    Finish {
        audit: bool,
        reply: Sender<Result<Finished, BlockError>>,
    },
    Pivot(Sender<Result<(), MoveError>>),
    Close(Sender<Result<(), BlockError>>),
}

/// An image that is complete and on stable storage.
#[derive(Debug, Clone, Copy)]
pub struct Finished {
    /// BLAKE3 of its contents, if asked for.
    pub audit: Option<[u8; 32]>,
}

/// Handle of a disk's arrival; dropping it ends the stream (and closes an image that was not pivoted to).
pub struct BlocksIn {
    name: String,
    disk_bytes: u64,
    commands: Inbox<Command>,
    budget: SyncSender<()>,
    tally: Arc<Mutex<BlocksTally>>,
    connection: Option<(LinkCloser, JoinHandle<()>)>,
}

impl BlocksIn {
    /// Opens the image and gets ready to apply what comes.
    pub fn start(disk: &DiskHandle, image: Image) -> Result<Self, MoveError> {
        let (commands, outbox) = Inbox::new().map_err(MoveError::io("create an event"))?;
        let (opened, opening) = mpsc::channel();
        let (budget, spend) = mpsc::sync_channel(READ_AHEAD);
        let name = disk.name().to_owned();
        disk.run(Box::new(move |context| {
            Box::pin(async move {
                let device = match image {
                    Image::Own => Ok(context.path().device()),
                    Image::New(path, options) => {
                        BlockDevice::open(context.ring(), &path, options).await.map(Rc::new)
                    }
                };
                match device {
                    Ok(device) => {
                        if opened.send(Ok(())).is_ok() {
                            serve(&context, device, &outbox, spend).await;
                        }
                    }
                    Err(error) => drop(opened.send(Err(error))),
                }
            })
        }))
        .map_err(|e| MoveError::Machine(e.to_string()))?;
        let gone = |_| MoveError::Machine(format!("the thread of disk {name} has ended"));
        opening.recv().map_err(gone)?.map_err(MoveError::disk(&name))?;
        Ok(Self { name, disk_bytes: disk.size(), commands, budget, tally: Arc::default(), connection: None })
    }

    /// Applies what comes over `link`. `lost` is called once if the stream ends or turns out to be nonsense.
    pub fn connect(
        &mut self,
        link: Link,
        lost: impl FnOnce(MoveError) + Send + 'static,
    ) -> Result<(), MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("block stream"))?;
        let (acks, to_send) = mpsc::channel();
        let thread = |what: &str| thread::Builder::new().name(format!("{what}-{}", self.name));
        thread("blocks-acks")
            .spawn(move || send_acks(sender, &to_send))
            .map_err(MoveError::io("start a thread"))?;
        let (commands, budget, tally) = (self.commands.clone(), self.budget.clone(), Arc::clone(&self.tally));
        let disk_bytes = self.disk_bytes;
        let reader = thread("blocks-in")
            .spawn(move || {
                if let Err(error) = read_ops(receiver, disk_bytes, &commands, &acks, &budget, &tally) {
                    lost(error);
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        self.connection = Some((closer, reader));
        Ok(())
    }

    /// Ends the connection, if there is one; gives how many operations have arrived. None of them is being applied any more, and the
    /// connection's threads report nothing more.
    pub fn end_connection(&mut self) -> Result<u64, MoveError> {
        if let Some((closer, reader)) = self.connection.take() {
            closer.close();
            if reader.join().is_err() {
                return Err(MoveError::Machine(format!("the reader of disk {} has panicked", self.name)));
            }
        }
        let (reply, idle) = mpsc::channel();
        self.commands.put(Command::Idle(reply));
        idle.recv().map_err(|_| self.gone())?;
        Ok(self.tally.lock().unwrap_or_else(PoisonError::into_inner).ops())
    }

    /// What has arrived so far.
    pub fn proof(&self) -> BlocksProof {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).proof()
    }

    /// Waits for everything that arrived to be on stable storage; reads it all again if asked to.
    pub fn finish(&self, audit: bool) -> Result<Finished, MoveError> {
        let (reply, done) = mpsc::channel();
        self.commands.put(Command::Finish { audit, reply });
        done.recv().map_err(|_| self.gone())?.map_err(MoveError::disk(&self.name))
    }

    /// Gives the guest this image in place of the disk's old one, which is closed. The guest is paused.
    pub fn pivot(&self) -> Result<(), MoveError> {
        let (reply, done) = mpsc::channel();
        self.commands.put(Command::Pivot(reply));
        done.recv().map_err(|_| self.gone())?
    }

    /// Closes an image that is complete and that no guest gets.
    pub fn close(&self) -> Result<(), MoveError> {
        let (reply, done) = mpsc::channel();
        self.commands.put(Command::Close(reply));
        done.recv().map_err(|_| self.gone())?.map_err(MoveError::disk(&self.name))
    }

    fn gone(&self) -> MoveError {
        MoveError::Machine(format!("the thread of disk {} has ended", self.name))
    }
}

impl Drop for BlocksIn {
    fn drop(&mut self) {
        if let Some((closer, _)) = &self.connection {
            closer.close();
        }
    }
}

fn read_ops(
    mut receiver: LinkReceiver,
    disk_bytes: u64,
    commands: &Inbox<Command>,
    acks: &Sender<BlockAck>,
    budget: &SyncSender<()>,
    tally: &Mutex<BlocksTally>,
) -> Result<(), MoveError> {
    loop {
        let (header, head) = receiver.frame()?;
        if header.kind != Kind::Block {
            return Err(MoveError::Machine("the source sent something else than blocks".into()));
        }
        let op =
            BlockHead::decode(&head, header.data_len, disk_bytes).map_err(MoveError::wire("block stream"))?;
        let data = match op.op {
            BlockOp::Write { sum } => {
                let mut data = AlignedBuf::zeroed(op.len as usize);
                receiver.receive(data.as_mut_slice()).map_err(MoveError::io("receive blocks"))?;
                if checksum(data.as_slice()) != sum {
                    let error = WireError::Checksum("a block");
                    return Err(MoveError::wire("block stream")(error));
                }
                Some(data)
            }
            _ => None,
        };
        let frame = op.encode().map_err(MoveError::wire("block stream"))?;
        {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            if op.seq != tally.ops() + 1 {
                let error = WireError::Malformed("block operation: not the next one");
                return Err(MoveError::wire("block stream")(error));
            }
            tally.add(&frame, op.data_bytes());
        }
        // Back-pressure: a slow disk stops the socket, not this host's memory.
        if budget.send(()).is_err() || !commands.put(Command::Apply(op, data, acks.clone())) {
            return Ok(());
        }
    }
}

fn send_acks(mut sender: LinkSender, acks: &Receiver<BlockAck>) {
    while let Ok(ack) = acks.recv() {
        let sent = ack
            .encode()
            .map_err(|e| e.to_string())
            .and_then(|frame| sender.send(&[&frame]).map_err(|e| e.to_string()));
        if let Err(error) = sent {
            tracing::debug!(error, "cannot acknowledge blocks");
            return;
        }
    }
}

/// Operations of the stream that are being applied.
#[derive(Default)]
struct InFlight {
    count: Cell<usize>,
    idle: RefCell<Option<Rc<Signal>>>,
}

impl InFlight {
    fn end_one(&self) {
        self.count.set(self.count.get() - 1);
        if self.count.get() == 0
            && let Some(idle) = self.idle.borrow_mut().take()
        {
            idle.set();
        }
    }

    async fn idle(&self) {
        if self.count.get() > 0 {
            let signal = Rc::new(Signal::default());
            *self.idle.borrow_mut() = Some(Rc::clone(&signal));
            signal.wait().await;
        }
    }
}

async fn serve(
    context: &DiskContext,
    device: Rc<BlockDevice>,
    outbox: &Outbox<Command>,
    spend: Receiver<()>,
) {
    let spend = Rc::new(spend);
    let in_flight = Rc::new(InFlight::default());
    while let Some(command) = outbox.next(context.ring()).await {
        match command {
            Command::Apply(op, data, acks) => {
                if op.op == BlockOp::Flush {
                    in_flight.idle().await;
                    let result = report(op, device.flush().await);
                    let _ = acks.send(BlockAck { seq: op.seq, result });
                    let _ = spend.try_recv();
                    continue;
                }
                let (device, counter) = (Rc::clone(&device), Rc::clone(&in_flight));
                let spend = Rc::clone(&spend);
                counter.count.set(counter.count.get() + 1);
                context.ring().spawn(async move {
                    let result = match (op.op, &data) {
                        (BlockOp::Write { .. }, Some(data)) => device.write(op.offset, data.io_vec()).await,
                        (BlockOp::Discard, _) => device.discard(op.offset, op.len).await,
                        _ => device.write_zeroes(op.offset, op.len, false).await,
                    };
                    let _ = acks.send(BlockAck { seq: op.seq, result: report(op, result) });
                    counter.end_one();
                    // Only now: a source that does not wait for answers must not fill this host's memory.
                    let _ = spend.try_recv();
                });
            }
            Command::Idle(reply) => {
                in_flight.idle().await;
                let _ = reply.send(());
            }
            Command::Finish { audit, reply } => {
                in_flight.idle().await;
                let _ = reply.send(finish(&device, audit).await);
            }
            Command::Pivot(reply) => {
                let _ = reply.send(pivot(context, &device).await);
            }
            Command::Close(reply) => {
                in_flight.idle().await;
                let closed = device.close().await;
                // Whoever asked may look at the file, and finds nobody at it.
                drop(device);
                let _ = reply.send(closed);
                return;
            }
        }
    }
    in_flight.idle().await;
}

fn report(op: BlockHead, result: Result<(), BlockError>) -> Result<(), Failure> {
    result.map_err(|error| {
        tracing::error!(%error, offset = op.offset, bytes = op.len, "the arriving image cannot be written");
        let number = error.os_error().and_then(|number| u32::try_from(number).ok());
        Failure { error: number.filter(|number| *number <= Failure::MAX).unwrap_or(0) }
    })
}

async fn finish(device: &BlockDevice, audit: bool) -> Result<Finished, BlockError> {
    device.flush().await?;
    Ok(Finished { audit: if audit { Some(audit::disk(device).await?) } else { None } })
}

async fn pivot(context: &DiskContext, device: &Rc<BlockDevice>) -> Result<(), MoveError> {
    let quiet = context.quiesce().await;
    context.path().set_tap(&quiet, None);
    let old = context
        .path()
        .replace_device(&quiet, Rc::clone(device))
        .map_err(|e| MoveError::Machine(e.to_string()))?;
    // The guest has its new image; what becomes of the old one must not hold it up.
    if let Err(error) = old.close().await {
        tracing::warn!(disk = context.name(), %error, "the old image is not closed cleanly");
    }
    Ok(())
}
