//! The target as the source's driver sees it: connections to another host, or new images in this process.
//!
//! Lives here: connecting, telling, listening. Never enters: what is told when.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use vmove_mirror::{
    source::Event,
    wire::{
        control::{self, SourceMsg, TargetMsg},
        frame::Kind,
        hello::Role,
    },
};

use super::{
    super::{
        MAX_MESSAGES, MoveError,
        link::{Link, LinkCloser, LinkReceiver, LinkSender},
        listen,
        local::LocalTarget,
        pages_out::PagesOut,
    },
    Driver,
};
use crate::process::protocol::{IdentityPaths, Listening};

/// The target's side of the connections.
pub(super) enum Peer {
    None,
    Remote { control: LinkSender, closer: LinkCloser, reader: JoinHandle<()> },
    Local(LocalTarget),
}

/// Connections of one epoch.
pub(super) struct Links {
    pub(super) epoch: u32,
    /// Until it is listened to.
    pub(super) control: Option<Link>,
    pub(super) pages: Link,
    /// In plan order.
    pub(super) disks: Vec<Link>,
}

/// All that is needed to call the target.
pub(super) struct Caller {
    target: Listening,
    host: String,
    identity: Option<IdentityPaths>,
    disks: u8,
}

impl Caller {
    /// Connects in all roles.
    pub(super) fn call(&self, epoch: u32) -> Result<Links, MoveError> {
        let call = |role| listen::call(&self.target, &self.host, role, epoch, self.identity.as_ref());
        Ok(Links {
            epoch,
            control: Some(call(Role::Control)?),
            pages: call(Role::Pages(0))?,
            disks: (0..self.disks).map(|index| call(Role::Disk(index))).collect::<Result<_, _>>()?,
        })
    }
}

impl Driver {
    pub(super) fn connect(&mut self) -> Result<(), MoveError> {
        let task = &self.task;
        if task.order.target.is_none() {
            let copies = task.order.copies.iter().cloned().zip(task.shapes.iter().cloned()).collect();
            let mut local =
                LocalTarget::new(Arc::clone(&task.machine), &task.vm.name, task.generation + 1, copies);
            let made = local.make(&task.events);
            self.peer = Peer::Local(local);
            self.pending_links = made?;
            return Ok(());
        }
        self.epoch = 1;
        let Links { control, pages, disks, .. } = self.caller()?.call(self.epoch)?;
        if let Some(control) = control {
            self.listen(control)?;
        }
        let task = &self.task;
        let (ram, pace) = (task.machine.ram().clone(), Arc::clone(&self.pace));
        self.pages = Some(PagesOut::start(ram, pages, pace, task.events.clone())?);
        self.pending_links = disks;
        Ok(())
    }

    /// What it takes to call the target of a move to another host.
    pub(super) fn caller(&self) -> Result<Caller, MoveError> {
        let task = &self.task;
        let identity = if task.order.plain { None } else { task.identity.clone() };
        if identity.is_none() && !task.order.plain {
            return Err(MoveError::Tls("this host has no identity: run `vmove init` or `vmove join`".into()));
        }
        let target = task.order.target.clone();
        let target = target.ok_or_else(|| MoveError::Machine("the move does not leave this host".into()))?;
        let disks = u8::try_from(task.shapes.len());
        let disks = disks.map_err(|_| MoveError::Machine("a VM has at most 255 disks".into()))?;
        Ok(Caller { target, host: task.order.to.host.clone(), identity, disks })
    }

    /// Takes a control connection into use.
    pub(super) fn listen(&mut self, link: Link) -> Result<(), MoveError> {
        let (control, receiver, closer) = link.split().map_err(MoveError::io("control link"))?;
        let lost = Arc::new(AtomicBool::new(false));
        self.control_lost = Arc::clone(&lost);
        let events = self.task.events.clone();
        let reader = thread::Builder::new()
            .name("control".into())
            .spawn(move || listen_to_target(receiver, &events, &lost))
            .map_err(MoveError::io("start a thread"))?;
        self.peer = Peer::Remote { control, closer, reader };
        Ok(())
    }

    pub(super) fn tell(&mut self, message: &SourceMsg) {
        if matches!(message, SourceMsg::Setup { .. } | SourceMsg::Resume) {
            self.awaiting_word = Some(Instant::now());
        }
        match &mut self.peer {
            Peer::None => {}
            Peer::Remote { control, .. } => {
                let sent = control::encode(message)
                    .map_err(|e| e.to_string())
                    .and_then(|frame| control.send(&[&frame]).map_err(|e| e.to_string()));
                if let Err(error) = sent {
                    self.control_lost.store(true, Ordering::SeqCst);
                    self.post(Event::LinkLost(error));
                }
            }
            Peer::Local(target) => {
                let answer = match message {
                    SourceMsg::Setup { .. } => Ok(TargetMsg::Ready),
                    SourceMsg::Prepare(_) => target.prepare(self.task.order.audit),
                    _ => return,
                };
                self.post(answer.map_or_else(|e| Event::Failed(e.to_string()), Event::Target));
            }
        }
    }
}

fn listen_to_target(mut receiver: LinkReceiver, events: &Sender<Event>, lost: &AtomicBool) {
    for _ in 0..MAX_MESSAGES {
        let message = receiver.frame().and_then(|(header, head)| match header.kind {
            Kind::Control => control::decode::<TargetMsg>(&head).map_err(MoveError::wire("control link")),
            _ => Err(MoveError::Machine("the target sent data on the control link".into())),
        });
        let event = match message {
            Ok(message) => Event::Target(message),
            Err(error) => {
                lost.store(true, Ordering::SeqCst);
                error.into_source_event()
            }
        };
        let ended = !matches!(event, Event::Target(_));
        if events.send(event).is_err() || ended {
            return;
        }
    }
    lost.store(true, Ordering::SeqCst);
    let _ = events.send(Event::Failed("the target sends more messages than a move has".into()));
}
