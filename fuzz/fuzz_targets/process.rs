//! See `vmove_tests::decoders::process_line`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::process_line(bytes);
});
