//! See `vmove_tests::decoders::frame_head`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::frame_head(bytes);
});
