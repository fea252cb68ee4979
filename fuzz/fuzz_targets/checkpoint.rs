//! See `vmove_tests::decoders::checkpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::checkpoint(bytes);
});
