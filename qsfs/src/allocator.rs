//! Two allocators, told apart by the size of what they are asked for.
//!
//! Small: jemalloc. A metad makes and drops some hundred small things per commit, on one thread after another; the C library's allocator
//! was a sixth of a leader's CPU time. Large: the C library's, told to keep what is freed. Pieces of 1 MiB come and go all the time, and
//! giving each back to the kernel costs a zeroed page fault per 4 KiB of the next: at 4+4 a fifth of the CPU time of a push. jemalloc
//! can keep them as well, but with all in jemalloc a mount held 120 to 190 MiB more while it wrote and read 4 GiB.

use std::alloc::{GlobalAlloc, Layout, System};
use tikv_jemallocator::Jemalloc;

/// Allocations from this size on are the C library's: pieces, but not the buffers of 512 KiB that sled makes for each flush. With those as
/// well a metad under load held 40 to 70 MiB more.
const LARGE_BYTES: usize = 1 << 20;

/// Free memory at the top of an arena of the C library that is kept rather than given back.
const KEPT_BYTES: i32 = 64 << 20;
/// Allocations of this size have pages of their own and are given back when freed.
const OWN_PAGES_BYTES: i32 = 16 << 20;
/// Arenas of the C library, each of which keeps memory.
const ARENAS: i32 = 2;

/// jemalloc's settings, which it reads by this name when it starts: few arenas for the same reason, and a thread that gives back what
/// has been free for ten seconds also when nothing happens any more.
#[expect(
    unsafe_code,
    reason = "the name is jemalloc's, its prefix that of the crate, and nothing else has it"
)]
#[unsafe(export_name = "_rjem_malloc_conf")]
static SETTINGS: &[u8; 33] = b"narenas:2,background_thread:true\0";

#[global_allocator]
static BY_SIZE: BySize = BySize;

struct BySize;

#[expect(
    unsafe_code,
    reason = "an allocator has no safe form; both of these are asked for what they were asked for before"
)]
// SAFETY: of one layout both alloc and dealloc go to the same of two allocators, which keep the contract; realloc goes to that one as well
// while the new size stays on its side, and is alloc, copy, dealloc otherwise.
unsafe impl GlobalAlloc for BySize {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that are asked for.
        unsafe {
            if is_large(layout.size()) {
                System.alloc(layout)
            } else {
                Jemalloc.alloc(layout)
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            if is_large(layout.size()) {
                System.alloc_zeroed(layout)
            } else {
                Jemalloc.alloc_zeroed(layout)
            }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the layout is that of its allocation, whose size said where it is from.
        unsafe {
            if is_large(layout.size()) {
                System.dealloc(memory, layout);
            } else {
                Jemalloc.dealloc(memory, layout);
            }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; the caller promises that `size` with this alignment is a layout. Two allocations do not overlap, and each
        // holds as many bytes as are copied. What could not be moved stays where it is.
        unsafe {
            match (is_large(layout.size()), is_large(size)) {
                (true, true) => System.realloc(memory, layout, size),
                (false, false) => Jemalloc.realloc(memory, layout, size),
                _ => {
                    let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                    if !moved.is_null() {
                        moved.copy_from_nonoverlapping(memory, size.min(layout.size()));
                        self.dealloc(memory, layout);
                    }
                    moved
                }
            }
        }
    }
}

fn is_large(bytes: usize) -> bool {
    bytes >= LARGE_BYTES
}

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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn jemalloc_has_found_its_settings() {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let names = threads
            .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
        let names: Vec<_> = names.collect();
        assert!(
            names.iter().any(|name| name.starts_with("jemalloc")),
            "{names:?}"
        );
    }

    /// The byte that belongs at a place.
    fn mark(at: usize) -> u8 {
        u8::try_from(at % 251).unwrap()
    }

    proptest! {
        /// Bytes that are kept in a vector while it grows and shrinks between the allocators are those of one that never moved.
        #[test]
        fn what_moves_between_the_allocators_stays_what_it_was(
            sizes in prop::collection::vec(1..3 * LARGE_BYTES, 1..12),
        ) {
            let mut bytes: Vec<u8> = Vec::new();
            for size in sizes {
                let kept = bytes.len().min(size);
                bytes.truncate(size);
                bytes.shrink_to_fit();
                bytes.reserve_exact(size - kept);
                bytes.extend((kept..size).map(mark));
                prop_assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == mark(at)));
            }
        }
    }
}
