//! Ranges with an operation in flight, and those that wait for them.
//!
//! Lives here: overlap and order. Never enters: what the operations do.

use super::OpId;

#[derive(Debug, Clone, Copy)]
struct Claim {
    id: OpId,
    offset: u64,
    len: u64,
}

impl Claim {
    fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.offset < offset + len && offset < self.offset + self.len
    }
}

/// Claims held and waited for. At most a queue's depth of them exist, so plain lists do.
#[derive(Debug, Default)]
pub struct Claims {
    held: Vec<Claim>,
    waiting: Vec<Claim>,
}

impl Claims {
    /// Claims a range, or queues behind everything it overlaps; whether it is held now.
    pub fn claim(&mut self, id: OpId, offset: u64, len: u64) -> bool {
        let free = !self.held.iter().chain(&self.waiting).any(|c| c.overlaps(offset, len));
        let list = if free { &mut self.held } else { &mut self.waiting };
        list.push(Claim { id, offset, len });
        free
    }

    /// Ends a claim; gives those that hold theirs now, oldest first.
    pub fn release(&mut self, id: OpId) -> Vec<OpId> {
        self.held.retain(|c| c.id != id);
        let mut granted = Vec::new();
        let mut still: Vec<Claim> = Vec::new();
        for claim in std::mem::take(&mut self.waiting) {
            let blocked = self.held.iter().chain(&still).any(|c| c.overlaps(claim.offset, claim.len));
            if blocked {
                still.push(claim);
            } else {
                self.held.push(claim);
                granted.push(claim.id);
            }
        }
        self.waiting = still;
        granted
    }
}
