//! How the C library's allocator keeps memory: pieces of 1 MiB come and go all the time, and giving each back to the kernel costs a
//! zeroed page fault per 4 KiB of the next. Measured at 4+4: a fifth of all CPU time of a push.

/// Free memory at the top of an arena that is kept rather than given back.
const KEPT_BYTES: i32 = 64 << 20;
/// Allocations of this size have pages of their own and are given back when freed.
const OWN_PAGES_BYTES: i32 = 16 << 20;
/// Arenas, each of which keeps memory.
const ARENAS: i32 = 2;

/// To be called before there is a second thread. Without it everything works, slower.
#[cfg(target_env = "gnu")]
pub(crate) fn tune() {
    for (option, value) in [
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES),
        (libc::M_ARENA_MAX, ARENAS),
    ] {
        #[expect(
            unsafe_code,
            reason = "mallopt has no safe form; it takes two numbers and touches no memory of ours"
        )]
        // SAFETY: called once, before any other thread exists.
        let taken = unsafe { libc::mallopt(option, value) };
        debug_assert_eq!(taken, 1, "mallopt knows its options");
    }
}

/// Other C libraries decide for themselves.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn tune() {}
