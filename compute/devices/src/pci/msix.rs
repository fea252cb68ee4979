//! MSI-X: the table of messages, the pending bits, the masks (PCI 3.0 section 6.8.2).
//!
//! What lives here: who may interrupt now, and what waits until it is unmasked. What never enters: interrupt
//! controllers; a message goes out through [`MsiSender`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{DeviceError, MsiSender};

/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control bits a guest may write.
pub const CONTROL_WRITABLE: u16 = FUNCTION_MASK | ENABLE;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Where the message is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// Whether it has to wait.
    pub masked: bool,
}

/// The table and its pending bits; the message control register is in configuration space. Plain and public:
/// untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// One entry a vector.
    pub entries: Vec<MsixEntry>,
    /// One pending flag a vector.
    pub pending: Vec<bool>,
}

/// What a signal looks at.
struct Table {
    enabled: bool,
    /// The function mask.
    masked: bool,
    entries: Vec<MsixEntry>,
    pending: Vec<bool>,
}

/// MSI-X of one function. All methods may be called from any thread.
pub struct Msix {
    state: Mutex<Table>,
    sender: Arc<dyn MsiSender>,
}

impl Msix {
    /// `vectors` messages, all masked, as after reset.
    pub fn new(vectors: u16, sender: Arc<dyn MsiSender>) -> Self {
        let vectors = usize::from(vectors);
        let state = Table {
            enabled: false,
            masked: false,
            entries: vec![MsixEntry { address: 0, data: 0, masked: true }; vectors],
            pending: vec![false; vectors],
        };
        Self { state: Mutex::new(state), sender }
    }

    /// Number of messages.
    pub fn vectors(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// Sends the message of `vector`, or notes it as pending while it is masked. Nothing happens while MSI-X is off
    /// or if there is no such vector (0xffff is the "no vector" of virtio).
    pub fn signal(&self, vector: u16) {
        let mut state = self.lock();
        let index = usize::from(vector);
        if !state.enabled || index >= state.entries.len() {
            return;
        }
        state.pending[index] = true;
        self.deliver(&mut state, index);
    }

    /// Takes the message control register as the guest wrote it.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & ENABLE != 0;
        state.masked = control & FUNCTION_MASK != 0;
        for index in 0..state.entries.len() {
            self.deliver(&mut state, index);
        }
    }

    /// A guest's read of the table at `offset` bytes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        fill(offset, data, |dword| {
            let Some(entry) = state.entries.get((dword / 4) as usize) else { return 0 };
            match dword % 4 {
                0 => entry.address as u32,
                1 => (entry.address >> 32) as u32,
                2 => entry.data,
                _ => u32::from(entry.masked),
            }
        });
    }

    /// A guest's write to the table at `offset` bytes. Only aligned accesses of 4 or 8 bytes are defined; others are
    /// ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.lock();
        for (dword, bytes) in (offset / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let index = (dword / 4) as usize;
            let Some(entry) = state.entries.get_mut(index) else { return };
            match dword % 4 {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.masked = value & 1 != 0,
            }
            self.deliver(&mut state, index);
        }
    }

    /// A guest's read of the pending bits at `offset` bytes; they cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        fill(offset, data, |dword| {
            let first = (dword as usize).saturating_mul(32);
            (0..32).fold(0, |bits, bit| {
                bits | u32::from(state.pending.get(first + bit).copied().unwrap_or(false)) << bit
            })
        });
    }

    pub fn state(&self) -> MsixState {
        let state = self.lock();
        MsixState { entries: state.entries.clone(), pending: state.pending.clone() }
    }

    /// Takes a saved state and the message control register beside it. Sends nothing, for the interrupt controllers
    /// may come later: what was pending goes out when it is unmasked.
    pub fn restore(&self, device: &str, saved: &MsixState, control: u16) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let vectors = state.entries.len();
        if saved.entries.len() != vectors || saved.pending.len() != vectors {
            let reason = format!("{} interrupt vectors, {vectors} here", saved.entries.len());
            return Err(DeviceError::bad_state(device, reason));
        }
        state.entries.clone_from(&saved.entries);
        state.pending.clone_from(&saved.pending);
        state.enabled = control & ENABLE != 0;
        state.masked = control & FUNCTION_MASK != 0;
        Ok(())
    }

    fn deliver(&self, state: &mut Table, index: usize) {
        let MsixEntry { address, data, masked } = state.entries[index];
        if !state.pending[index] || !state.enabled || state.masked || masked {
            return;
        }
        state.pending[index] = false;
        if let Err(error) = self.sender.send(address, data) {
            tracing::error!(%error, address, data, "cannot send a message-signalled interrupt");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills `data`, which starts at byte `offset`, from a register file of 32-bit little-endian words.
fn fill(offset: u64, data: &mut [u8], word: impl Fn(u64) -> u32) {
    for (at, byte) in (offset..).zip(data) {
        *byte = word(at / 4).to_le_bytes()[(at % 4) as usize];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u32)>>);

    impl MsiSender for Recorder {
        fn send(&self, address: u64, data: u32) -> io::Result<()> {
            self.0.lock().unwrap().push((address, data));
            Ok(())
        }
    }

    impl Recorder {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn msix() -> (Msix, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(2, recorder.clone());
        msix.write_table(0, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(8, &0x41u64.to_le_bytes());
        msix.set_control(ENABLE);
        (msix, recorder)
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn an_unmasked_vector_is_sent_at_once() {
        let (msix, recorder) = msix();
        msix.signal(0);
        assert_eq!(recorder.take(), [(0xfee0_0000, 0x41)]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_masked_vector_waits_for_its_unmasking_and_is_sent_once() {
        let (msix, recorder) = msix();
        msix.write_table(12, &1u32.to_le_bytes());
        msix.signal(0);
        msix.signal(0);
        assert_eq!((recorder.take(), pending(&msix)), (vec![], 1));
        msix.write_table(12, &0u32.to_le_bytes());
        assert_eq!((recorder.take().len(), pending(&msix)), (1, 0));
    }

    #[test]
    fn the_function_mask_holds_all_vectors() {
        let (msix, recorder) = msix();
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.signal(0);
        assert_eq!((recorder.take(), pending(&msix)), (vec![], 1));
        msix.set_control(ENABLE);
        assert_eq!(recorder.take().len(), 1);
    }

    #[test]
    fn off_or_unknown_vectors_do_nothing() {
        let (msix, recorder) = msix();
        msix.signal(2);
        msix.signal(0xffff);
        msix.set_control(0);
        msix.signal(0);
        msix.set_control(ENABLE);
        assert!(recorder.take().is_empty());
    }

    #[test]
    fn the_table_reads_back_and_ignores_odd_accesses() {
        let (msix, _) = msix();
        let mut data = [0; 16];
        msix.read_table(0, &mut data);
        assert_eq!(data[..8], 0xfee0_0000u64.to_le_bytes());
        assert_eq!(data[8..], 0x41u64.to_le_bytes());
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(0, &[0xff; 2]);
        msix.write_table(4096, &[0xff; 4]);
        let mut again = [0; 16];
        msix.read_table(0, &mut again);
        assert_eq!(data, again);
    }

    #[test]
    fn state_keeps_pending_bits() {
        let (msix, _) = msix();
        msix.write_table(12, &1u32.to_le_bytes());
        msix.signal(0);
        let recorder = Arc::new(Recorder::default());
        let other = Msix::new(2, recorder.clone());
        other.restore("d", &msix.state(), ENABLE).unwrap();
        assert!(recorder.take().is_empty());
        other.write_table(12, &0u32.to_le_bytes());
        assert_eq!(recorder.take(), [(0xfee0_0000, 0x41)]);
        assert!(Msix::new(3, recorder).restore("d", &msix.state(), ENABLE).is_err());
    }
}
