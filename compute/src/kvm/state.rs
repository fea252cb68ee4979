//! The state of a VM outside its vCPUs: interrupt controllers, timer, clock.
//!
//! What never enters: vCPUs, device models.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};
use vmove_devices::state::{Section, Sections};

use super::{Error, Vm};

const SECTION: &str = "kvm/vm";
const VERSION: u16 = 1;

/// Interrupt controllers, timer and clock of a VM. Plain and public: untrusted until [`VmState::load`].
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// The two PICs and the I/O APIC, in the order of their numbers.
    pub irqchips: [kvm_irqchip; 3],
    /// The timer.
    pub pit: kvm_pit_state2,
    /// kvmclock when the state was read, nanoseconds.
    pub clock_ns: u64,
    /// The host's time at that moment, nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl VmState {
    /// Reads the state; the vCPUs are paused.
    ///
    /// # Errors
    /// [`Error::Call`] naming what KVM does not give.
    pub fn read(vm: &Vm) -> Result<Self, Error> {
        let clock = vm.fd().get_clock().map_err(Error::call("read the clock"))?;
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.fd()
                .get_irqchip(&mut chip)
                .map_err(Error::call(format!("read interrupt controller {chip_id}")))?;
            Ok::<_, Error>(chip)
        };
        Ok(Self {
            irqchips: [
                chip(KVM_IRQCHIP_PIC_MASTER)?,
                chip(KVM_IRQCHIP_PIC_SLAVE)?,
                chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            pit: vm.fd().get_pit2().map_err(Error::call("read the timer"))?,
            clock_ns: clock.clock,
            realtime_ns: if clock.flags & KVM_CLOCK_REALTIME != 0 { clock.realtime } else { realtime_ns() },
        })
    }

    /// The state as a section.
    ///
    /// # Errors
    /// [`Error::Section`].
    pub fn encode(&self) -> Result<Section, Error> {
        Ok(Section::encode(SECTION, VERSION, self)?)
    }

    /// Takes the state and checks what KVM will not.
    ///
    /// # Errors
    /// [`Error::Section`] or [`Error::BadState`].
    pub fn decode(sections: &mut Sections) -> Result<Self, Error> {
        let state: Self = sections.take(SECTION, VERSION)?;
        for (expected, chip) in state.irqchips.iter().enumerate() {
            if chip.chip_id as usize != expected {
                return Err(Error::BadState(format!(
                    "interrupt controller {} in place of {expected}",
                    chip.chip_id
                )));
            }
        }
        Ok(state)
    }

    /// Time from the reading of the state to now by the hosts' clocks; none if this host's clock is behind.
    ///
    /// It is how far the guest's CLOCK_MONOTONIC jumps: the pause (or the age of a checkpoint) and by how much this host's clock is
    /// ahead of the other's, never back. So the guest's wall clock is as right here as it was there, or ahead of this host's by as much
    /// as that is behind more than the pause.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(realtime_ns().saturating_sub(self.realtime_ns))
    }

    /// Puts the state into a new VM, before its vCPUs get theirs. kvmclock goes forward by `elapsed`.
    pub(super) fn load(&self, vm: &Vm, elapsed: Duration) -> Result<(), Error> {
        // The elapsed time is added here and not by KVM (KVM_CLOCK_REALTIME): so it is one and the same for kvmclock
        // and for every TSC, and kernels before 5.16 need no other way.
        let clock = kvm_clock_data {
            clock: self.clock_ns.saturating_add(elapsed.as_nanos() as u64),
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(Error::call("set the clock"))?;
        for chip in &self.irqchips {
            vm.fd()
                .set_irqchip(chip)
                .map_err(Error::call(format!("set interrupt controller {}", chip.chip_id)))?;
        }
        vm.fd().set_pit2(&self.pit).map_err(Error::call("set the timer"))
    }
}

fn realtime_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(chips: [u32; 3], realtime_ns: u64) -> VmState {
        VmState {
            irqchips: chips.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }),
            pit: kvm_pit_state2::default(),
            clock_ns: 5,
            realtime_ns,
        }
    }

    #[test]
    fn controllers_out_of_order_are_refused() {
        let decode = |state: &VmState| {
            VmState::decode(&mut Sections::new(vec![state.encode().unwrap()]).unwrap()).map(|_| ())
        };
        assert!(decode(&state([0, 1, 2], 0)).is_ok());
        assert!(matches!(decode(&state([0, 2, 1], 0)), Err(Error::BadState(_))));
    }

    #[test]
    fn a_clock_from_the_future_adds_nothing() {
        assert_eq!(state([0, 1, 2], u64::MAX).elapsed(), Duration::ZERO);
        assert!(state([0, 1, 2], realtime_ns()).elapsed() < Duration::from_hours(1));
    }
}
