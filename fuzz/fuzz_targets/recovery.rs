//! See `vmove_tests::decoders::recovery_body`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::recovery_body(bytes);
});
