//! See `vmove_tests::decoders::journal_record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmove_tests::decoders::journal_record(bytes);
});
