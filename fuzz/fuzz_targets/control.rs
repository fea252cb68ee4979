//! See `vmove_tests::decoders::control_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::control_message(bytes);
});
