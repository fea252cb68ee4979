//! The target of a datastore-only move: new images in this process, filled over socket pairs by the same block streams.
//!
//! A checkpoint fills its images by the same way, and keeps them as they are at the pause. Lives here: making, proving, pivoting,
//! closing, discarding them. Never enters: memory, other hosts.

use std::sync::{Arc, mpsc::Sender};

use vmove_mirror::{
    digest,
    source::Event,
    wire::control::{Counters, Proof, TargetMsg},
};
use vmove_storage::{OwnerState, Stamp};

use super::{
    MoveError,
    blocks_in::{BlocksIn, Image},
    images,
    link::Link,
};
use crate::{
    machine::Machine,
    process::protocol::{DiskPlacement, ImageShape},
};

/// New images for some disks of a running machine.
pub struct LocalTarget {
    machine: Arc<Machine>,
    vm: String,
    generation: u64,
    copies: Vec<(DiskPlacement, ImageShape)>,
    arrivals: Vec<BlocksIn>,
}

impl LocalTarget {
    /// Nothing is made yet.
    pub fn new(
        machine: Arc<Machine>,
        vm: &str,
        generation: u64,
        copies: Vec<(DiskPlacement, ImageShape)>,
    ) -> Self {
        Self { machine, vm: vm.to_owned(), generation, copies, arrivals: Vec::new() }
    }

    /// Makes the images; gives the source's ends of the block streams, in plan order.
    pub fn make(&mut self, events: &Sender<Event>) -> Result<Vec<Link>, MoveError> {
        let mut links = Vec::new();
        for (place, shape) in &self.copies {
            let disk = self
                .machine
                .disk(&place.name)
                .ok_or_else(|| MoveError::Machine(format!("the VM has no disk {}", place.name)))?;
            images::make(&place.path, shape, &self.vm, self.generation)?;
            let (here, there) = Link::pair().map_err(MoveError::io("make a socket pair"))?;
            let lost = events.clone();
            let mut arrival = BlocksIn::start(disk, Image::New(place.path.clone(), images::filling(shape)))?;
            arrival.connect(there, move |error| drop(lost.send(Event::LinkLost(error.to_string()))))?;
            self.arrivals.push(arrival);
            links.push(here);
        }
        Ok(links)
    }

    /// What a target answers to `Prepare`.
    pub fn prepare(&self, audit: bool) -> Result<TargetMsg, MoveError> {
        let mut counters = Counters::default();
        let (mut chains, mut audits) = (Vec::new(), Vec::new());
        for arrival in &self.arrivals {
            audits.extend(arrival.finish(audit)?.audit);
            let proof = arrival.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
        }
        let mut allocated = Vec::new();
        for (place, _) in &self.copies {
            allocated.push(
                vmove_storage::info(&place.path).map_err(MoveError::disk(&place.name))?.allocated_bytes,
            );
        }
        let proof = Proof {
            counters,
            digest: digest::combine(None, &chains),
            audit: audit.then(|| digest::combine(None, &audits)),
        };
        Ok(TargetMsg::Prepared { proof, allocated, load_us: 0 })
    }

    /// Gives the guest its new images. The guest is paused and the commit is on disk.
    pub fn pivot(&self) -> Result<(), MoveError> {
        for arrival in &self.arrivals {
            arrival.pivot()?;
        }
        for (place, _) in &self.copies {
            images::stamp(&place.path, &self.vm, self.generation, OwnerState::Owned)
                .map_err(MoveError::disk(&place.name))?;
        }
        Ok(())
    }

    /// Closes the images as they are, complete, clean and nobody's. The mirrors have ended.
    pub fn close(&mut self) -> Result<(), MoveError> {
        for arrival in self.arrivals.drain(..) {
            arrival.close()?;
        }
        for (place, _) in &self.copies {
            Stamp::remove(&place.path).map_err(MoveError::disk(&place.name))?;
        }
        Ok(())
    }

    /// Removes what was made.
    pub fn discard(&mut self) {
        self.arrivals.clear();
        for (place, _) in &self.copies {
            images::discard(&place.path, &self.vm, self.generation);
        }
    }
}
