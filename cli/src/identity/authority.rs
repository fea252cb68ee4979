//! The cluster's certificate authority: made once by `vmove init`, signs one certificate per host.
//!
//! A host's certificate carries its name as the only DNS name and its IP address, and nothing that the host itself asked for but
//! its public key. Never enters: tokens (who may ask), files.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, date_time_ymd,
};

use super::{IdentityError, check_host_name};

/// Longest certificate signing request that is looked at, bytes.
pub const MAX_CSR: usize = 16 << 10;

/// An authority that can sign.
#[derive(Debug)]
pub struct Authority {
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn failed(action: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |e| IdentityError::Certificate { action, reason: e.to_string() }
}

impl Authority {
    /// Makes a new authority; gives it and its private key (PEM).
    pub fn create() -> Result<(Self, String), IdentityError> {
        let key = KeyPair::generate().map_err(failed("make the authority's key"))?;
        let mut params = base_params("vmove cluster authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&key).map_err(failed("make the authority's certificate"))?;
        let key_pem = key.serialize_pem();
        Ok((Self::open(&cert.pem(), &key_pem)?, key_pem))
    }

    /// An authority from its files' texts.
    pub fn open(cert_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::from_pem(key_pem).map_err(failed("read the authority's key"))?;
        let issuer =
            Issuer::from_ca_cert_pem(cert_pem, key).map_err(failed("read the authority's certificate"))?;
        Ok(Self { cert_pem: cert_pem.to_owned(), issuer })
    }

    /// Its own certificate (PEM).
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// A certificate for a host with a key of its own (used by `init`); the chain (PEM) ends with the authority.
    pub fn issue(&self, name: &str, ip: IpAddr, key: &KeyPair) -> Result<String, IdentityError> {
        self.sign(name, ip, key)
    }

    /// A certificate for the public key in a signing request. Name, address and uses are what the caller says, never what the
    /// request says. The request's own signature is checked, so its sender has the private key.
    pub fn issue_for_request(&self, name: &str, ip: IpAddr, csr_pem: &str) -> Result<String, IdentityError> {
        if csr_pem.len() > MAX_CSR {
            return Err(IdentityError::Certificate {
                action: "read the signing request",
                reason: format!("it is longer than {MAX_CSR} bytes"),
            });
        }
        let request =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(failed("read the signing request"))?;
        self.sign(name, ip, &request.public_key)
    }

    fn sign(&self, name: &str, ip: IpAddr, key: &impl PublicKeyData) -> Result<String, IdentityError> {
        check_host_name(name)?;
        let dns =
            name.try_into().map_err(|e: rcgen::Error| failed("put the host's name into a certificate")(e))?;
        let mut params = base_params(name);
        params.subject_alt_names = vec![SanType::DnsName(dns), SanType::IpAddress(ip)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let cert = params.signed_by(key, &self.issuer).map_err(failed("sign the host's certificate"))?;
        Ok(format!("{}{}", cert.pem(), self.cert_pem))
    }
}

/// A signing request for a host's key (PEM).
pub fn signing_request(name: &str, key: &KeyPair) -> Result<String, IdentityError> {
    check_host_name(name)?;
    base_params(name)
        .serialize_request(key)
        .and_then(|request| request.pem())
        .map_err(failed("make the signing request"))
}

/// A new private key for a host.
pub fn host_key() -> Result<KeyPair, IdentityError> {
    KeyPair::generate().map_err(failed("make the host's key"))
}

fn base_params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    params.distinguished_name = subject;
    // Membership ends by leaving the cluster, not by a clock that runs differently on two hosts.
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2099, 12, 31);
    params
}
