//! See `vmove_tests::decoders::console_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::console_messages(bytes);
});
