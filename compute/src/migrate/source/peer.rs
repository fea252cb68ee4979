//! The target as the source's driver sees it: connections to another host, or new images in this process.
//!
//! Lives here: connecting, telling, listening. Never enters: what is told when.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread,
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
        link::{LinkCloser, LinkReceiver, LinkSender},
        listen,
        local::LocalTarget,
        pages_out::PagesOut,
    },
    Driver,
};

/// The target's side of the connections.
pub(super) enum Peer {
    None,
    Remote { control: LinkSender, closer: LinkCloser },
    Local(LocalTarget),
}

impl Driver {
    pub(super) fn connect(&mut self) -> Result<(), MoveError> {
        let task = &self.task;
        let Some(target) = task.order.target.clone() else {
            let copies = task.order.copies.iter().cloned().zip(task.shapes.iter().cloned()).collect();
            let mut local =
                LocalTarget::new(Arc::clone(&task.machine), &task.vm.name, task.generation + 1, copies);
            let made = local.make(&task.events);
            self.peer = Peer::Local(local);
            self.pending_links = made?;
            return Ok(());
        };
        let identity = if task.order.plain { None } else { task.identity.as_ref() };
        if identity.is_none() && !task.order.plain {
            return Err(MoveError::Tls("this host has no identity: run `vmove init` or `vmove join`".into()));
        }
        let host = &task.order.to.host;
        let call = |role| listen::call(&target, host, role, identity);
        let (control, receiver, closer) =
            call(Role::Control)?.split().map_err(MoveError::io("control link"))?;
        self.peer = Peer::Remote { control, closer };
        let (events, lost) = (task.events.clone(), Arc::clone(&self.control_lost));
        thread::Builder::new()
            .name("control".into())
            .spawn(move || listen_to_target(receiver, &events, &lost))
            .map_err(MoveError::io("start a thread"))?;
        self.pages = Some(PagesOut::start(
            task.machine.ram().clone(),
            call(Role::Pages(0))?,
            Arc::clone(&self.pace),
            task.events.clone(),
        )?);
        for index in 0..task.shapes.len() {
            self.pending_links.push(call(Role::Disk(index as u8))?);
        }
        Ok(())
    }

    pub(super) fn tell(&mut self, message: &SourceMsg) {
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
                Event::LinkLost(error.to_string())
            }
        };
        let ended = matches!(event, Event::LinkLost(_));
        if events.send(event).is_err() || ended {
            return;
        }
    }
    lost.store(true, Ordering::SeqCst);
    let _ = events.send(Event::LinkLost("the target sends more messages than a move has".into()));
}
