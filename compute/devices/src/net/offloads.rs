//! Work on packets that guest and host may leave to each other: checksums and segmentation.
//!
//! What lives here: which virtio feature stands for what, and which need which. What never enters: doing it; the host's
//! kernel does.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
};

/// A set of offloads. Each counts for both directions when it is offered; in use, only the guest's side matters, because
/// what the guest sends says itself what it needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums may be missing.
    pub checksum: bool,
    /// TCP over IPv4 may come in large segments.
    pub tcp4: bool,
    /// TCP over IPv6 may come in large segments.
    pub tcp6: bool,
    /// Such segments may carry congestion notifications.
    pub ecn: bool,
    /// UDP may come in large fragments.
    pub udp: bool,
}

impl Offloads {
    /// The feature bits that offer this set, for the guest to leave work to the host and the reverse.
    pub(crate) fn features(self) -> u64 {
        let bits = |on: bool, guest: u32, host: u32| if on { 1 << guest | 1 << host } else { 0 };
        bits(self.checksum, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CSUM)
            | bits(self.tcp4, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4)
            | bits(self.tcp6, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO6)
            | bits(self.ecn, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_HOST_ECN)
            | bits(self.udp, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO)
    }

    /// What a guest that accepted `features` takes. Segments need checksums, congestion notifications need segments
    /// (virtio 1.2 section 5.1.3.1); a driver that forgot the one does not get the other.
    pub(crate) fn taken_by_guest(features: u64) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
        let tcp4 = checksum && has(VIRTIO_NET_F_GUEST_TSO4);
        let tcp6 = checksum && has(VIRTIO_NET_F_GUEST_TSO6);
        Self {
            checksum,
            tcp4,
            tcp6,
            ecn: (tcp4 || tcp6) && has(VIRTIO_NET_F_GUEST_ECN),
            udp: checksum && has(VIRTIO_NET_F_GUEST_UFO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_gets_nothing_it_cannot_take() {
        let all = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, udp: true };
        assert_eq!(Offloads::taken_by_guest(all.features()), all);
        assert_eq!(Offloads::taken_by_guest(0), Offloads::default());
        let no_checksum = all.features() & !(1 << VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(Offloads::taken_by_guest(no_checksum), Offloads::default());
        let ecn_alone = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert!(!Offloads::taken_by_guest(ecn_alone).ecn);
        assert_eq!(Offloads::default().features(), 0);
    }
}
