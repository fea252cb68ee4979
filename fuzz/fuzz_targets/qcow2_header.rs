//! See `vmove_tests::decoders::qcow2_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::qcow2_header(bytes);
});
