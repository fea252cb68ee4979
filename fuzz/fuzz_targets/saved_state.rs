//! See `vmove_tests::decoders::saved_state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::saved_state(bytes);
});
