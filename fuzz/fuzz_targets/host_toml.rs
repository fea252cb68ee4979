//! See `vmove_tests::decoders::host_toml`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::host_toml(bytes);
});
