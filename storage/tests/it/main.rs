//! Tests of the storage crate through its public interface, with the real `qemu-img` as the judge.

mod common;
mod device;
mod locks;
mod repair;
