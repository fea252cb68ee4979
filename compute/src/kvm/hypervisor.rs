//! Opening KVM, and refusing a host that lacks what a VM here needs.
//!
//! What never enters: VMs and vCPUs.

use std::io;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::{Error, cpuid};

/// The host's KVM.
pub struct Hypervisor {
    kvm: Kvm,
    supported: CpuId,
    msrs: Vec<u32>,
}

/// What no VM here can do without.
const NEEDED: [(Cap, &str); 13] = [
    (Cap::Irqchip, "in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
];

impl Hypervisor {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::Open`] with what to do about it, [`Error::Missing`] naming the first capability that is not there.
    pub fn open() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| {
            let source = io::Error::from(error);
            let hint = match source.kind() {
                io::ErrorKind::NotFound => {
                    "load the kvm_intel or kvm_amd module, and enable virtualization in the firmware"
                }
                io::ErrorKind::PermissionDenied => "join the group that owns it, usually kvm",
                _ => "is KVM usable on this host?",
            };
            Error::Open { source, hint }
        })?;
        if kvm.get_api_version() != KVM_API_VERSION as i32 {
            return Err(Error::Missing(format!("API version {KVM_API_VERSION}")));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Error::Missing((*name).to_owned()));
        }
        let mut supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::call("read the supported CPUID"))?;
        cpuid::filter(&mut supported, kvm.check_extension(Cap::TscDeadlineTimer));
        let msrs =
            kvm.get_msr_index_list().map_err(Error::call("read the list of MSRs"))?.as_slice().to_vec();
        Ok(Self { kvm, supported, msrs })
    }

    /// What a guest's CPUID may say here, before the topology of one VM is written into it.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported
    }

    /// The MSRs whose values are a guest's state on this host.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Most vCPUs of a VM.
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}
