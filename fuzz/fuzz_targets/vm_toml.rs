//! See `vmove_tests::decoders::vm_toml`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::vm_toml(bytes);
});
