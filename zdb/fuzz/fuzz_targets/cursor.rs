#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qsfs_zdb_fuzz::wire::decode_cursor(bytes));
