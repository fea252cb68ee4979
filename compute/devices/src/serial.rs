//! COM1, a 16550 at I/O port 0x3f8, on `vm-superio`'s registers.
//!
//! What lives here: the port range, a bounded buffer for input that the 64-byte FIFO has no room for, saved state.
//! What never enters: terminals, sockets, log files; they are behind the sink.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

use crate::DeviceError;
use crate::state::{Section, Sections};

/// Where the guest's output goes. It is called with one byte at a time, on the vCPU's thread, so it should not wait.
pub type ConsoleSink = Arc<Mutex<dyn Write + Send>>;

const SECTION: &str = "serial";
const VERSION: u16 = 1;

/// The interrupt line as the UART model wants it.
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The shared sink as the UART model wants it.
struct Output(ConsoleSink);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

struct Inner {
    uart: Uart<Line, NoEvents, Output>,
    /// Input that waits for room in the FIFO.
    waiting: VecDeque<u8>,
}

/// The first serial port of the machine. All methods may be called from any thread.
pub struct Serial {
    inner: Mutex<Inner>,
    line: Arc<EventFd>,
    sink: ConsoleSink,
}

/// The registers of the UART and its unread input. Plain and public: untrusted until [`Serial::restore`] took it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the 16550's registers by their usual names")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// The receive FIFO, oldest first; at most 64 bytes.
    pub fifo: Vec<u8>,
    /// Input beyond the FIFO, oldest first; at most [`Serial::MAX_WAITING`] bytes.
    pub waiting: Vec<u8>,
}

impl Serial {
    /// First I/O port.
    pub const PORT: u16 = 0x3f8;
    /// Number of I/O ports.
    pub const PORTS: u16 = 8;
    /// ISA interrupt line of COM1, to which the VMM connects the event given to [`new`](Self::new).
    pub const IRQ: u32 = 4;
    /// Most bytes of input kept for the guest beyond its FIFO.
    pub const MAX_WAITING: usize = 64 << 10;

    /// A port after reset. `line` is the interrupt (an irqfd in the VMM), `sink` gets the guest's output.
    pub fn new(line: EventFd, sink: ConsoleSink) -> Self {
        let line = Arc::new(line);
        let uart = Uart::new(Line(Arc::clone(&line)), Output(Arc::clone(&sink)));
        Self { inner: Mutex::new(Inner { uart, waiting: VecDeque::new() }), line, sink }
    }

    /// Whether `port` is one of ours.
    pub fn claims(port: u16) -> bool {
        (Self::PORT..Self::PORT + Self::PORTS).contains(&port)
    }

    /// A guest's read. Wider accesses than a byte read neighbouring registers, as an 8-bit device on the bus does;
    /// a port that is not ours reads as ones.
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        for (port, byte) in (port..=u16::MAX).zip(data) {
            *byte = if Self::claims(port) { inner.uart.read((port - Self::PORT) as u8) } else { 0xff };
        }
        inner.refill();
    }

    /// A guest's write; see [`io_read`](Self::io_read) for its width. Output the sink refuses is lost, as on a wire.
    pub fn io_write(&self, port: u16, data: &[u8]) {
        let mut inner = self.lock();
        for (port, byte) in (port..=u16::MAX).zip(data) {
            if Self::claims(port)
                && let Err(error) = inner.uart.write((port - Self::PORT) as u8, *byte)
            {
                tracing::debug!(%error, "serial: write");
            }
        }
        inner.refill();
    }

    /// Gives input to the guest. Returns how many bytes were taken; the rest did not fit into the buffer of
    /// [`MAX_WAITING`](Self::MAX_WAITING) bytes and is the caller's to offer again.
    pub fn feed(&self, input: &[u8]) -> usize {
        let mut inner = self.lock();
        let room = Self::MAX_WAITING - inner.waiting.len().min(Self::MAX_WAITING);
        let taken = input.len().min(room);
        inner.waiting.extend(&input[..taken]);
        inner.refill();
        taken
    }

    /// The state now. The caller has stopped the vCPUs and the input.
    pub fn state(&self) -> SerialState {
        let inner = self.lock();
        let uart = inner.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            waiting: inner.waiting.iter().copied().collect(),
        }
    }

    /// The state as a section.
    pub fn save(&self) -> Result<Section, DeviceError> {
        Ok(Section::encode(SECTION, VERSION, &self.state())?)
    }

    /// Replaces the state by the section of [`save`](Self::save). A pending interrupt is raised again.
    pub fn restore(&self, sections: &mut Sections) -> Result<(), DeviceError> {
        self.set_state(sections.take(SECTION, VERSION)?)
    }

    /// Replaces the state.
    pub fn set_state(&self, state: SerialState) -> Result<(), DeviceError> {
        if state.waiting.len() > Self::MAX_WAITING {
            let reason = format!("{} bytes of waiting input", state.waiting.len());
            return Err(DeviceError::bad_state(SECTION, reason));
        }
        let uart = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo,
        };
        let line = Line(Arc::clone(&self.line));
        let uart = Uart::from_state(&uart, line, NoEvents, Output(Arc::clone(&self.sink)))
            .map_err(|error| DeviceError::bad_state(SECTION, error.to_string()))?;
        *self.lock() = Inner { uart, waiting: state.waiting.into() };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves waiting input into the FIFO as far as it has room. In loopback mode the UART takes none.
    fn refill(&mut self) {
        while !self.waiting.is_empty() && self.uart.fifo_capacity() > 0 {
            let (front, _) = self.waiting.as_slices();
            match self.uart.enqueue_raw_bytes(front) {
                Ok(0) | Err(_) => break,
                Ok(count) => drop(self.waiting.drain(..count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u16 = Serial::PORT;
    const IER: u16 = Serial::PORT + 1;
    const LSR: u16 = Serial::PORT + 5;

    fn serial() -> (Serial, Arc<Mutex<Vec<u8>>>, EventFd) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let out = Arc::new(Mutex::new(Vec::new()));
        (Serial::new(line.try_clone().unwrap(), out.clone()), out, line)
    }

    fn read(serial: &Serial, port: u16) -> u8 {
        let mut byte = [0];
        serial.io_read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn output_goes_to_the_sink() {
        let (serial, out, _) = serial();
        for byte in b"hello" {
            serial.io_write(DATA, &[*byte]);
        }
        assert_eq!(*out.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_arrives_in_order() {
        let (serial, _, line) = serial();
        serial.io_write(IER, &[1]);
        let input: Vec<u8> = (0..200u8).collect();
        assert_eq!(serial.feed(&input), 200);
        assert!(line.read().is_ok(), "interrupt raised");
        let mut got = Vec::new();
        while read(&serial, LSR) & 1 != 0 {
            got.push(read(&serial, DATA));
        }
        assert_eq!(got, input);
    }

    #[test]
    fn input_is_bounded() {
        let (serial, _, _) = serial();
        let taken = serial.feed(&vec![b'x'; Serial::MAX_WAITING * 2]);
        assert_eq!(taken, Serial::MAX_WAITING);
        assert!(serial.feed(&[b'y'; 100]) <= 64, "only what moved into the FIFO is free again");
    }

    #[test]
    fn state_survives_and_raises_a_pending_interrupt() {
        let (from, _, _) = serial();
        from.io_write(IER, &[1]);
        from.feed(&[b'z'; 100]);
        let mut sections = Sections::new(vec![from.save().unwrap()]).unwrap();
        let (to, _, line) = serial();
        to.restore(&mut sections).unwrap();
        assert!(line.read().is_ok());
        assert_eq!(to.state(), from.state());
        let count = std::iter::from_fn(|| (read(&to, LSR) & 1 != 0).then(|| read(&to, DATA))).count();
        assert_eq!(count, 100);
    }

    #[test]
    fn bad_state_is_refused() {
        let (serial, _, _) = serial();
        let long_fifo = SerialState { fifo: vec![0; 65], ..Default::default() };
        assert!(matches!(serial.set_state(long_fifo), Err(DeviceError::BadState { .. })));
        let long_wait = SerialState { waiting: vec![0; Serial::MAX_WAITING + 1], ..Default::default() };
        assert!(matches!(serial.set_state(long_wait), Err(DeviceError::BadState { .. })));
    }
}
