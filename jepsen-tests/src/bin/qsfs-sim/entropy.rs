//! What this process gets from the operating system, made repeatable: random bytes and the monotonic clock.
//!
//! Rust's hash maps, tokio's `select!` and `rand` draw their seeds by `getrandom`; `Instant` and `SystemTime` ask `clock_gettime`. Both
//! are defined here, so that the linker takes these instead of the C library's. Only between [`begin`] and [`end`], and only on the
//! thread that called [`begin`], do they answer from the seed and from virtual time.

use nix::sys::personality::{self, Persona};
use std::cell::Cell;
use std::ffi::{c_int, c_long, c_uint, c_void};
use std::time::Duration;

/// Virtual time begins here, as certificates want it.
const EPOCH_NS: u64 = 1_700_000_000_000_000_000;

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
}

/// Begins this program again with memory always at the same addresses, unless it is so already.
pub(crate) fn fix_addresses() -> std::io::Result<()> {
    use std::os::unix::process::CommandExt;
    let now = personality::get()?;
    if now.contains(Persona::ADDR_NO_RANDOMIZE) {
        return Ok(());
    }
    personality::set(now | Persona::ADDR_NO_RANDOMIZE)?;
    let arguments = std::env::args_os().skip(1);
    Err(std::process::Command::new(std::env::current_exe()?)
        .args(arguments)
        .exec())
}

/// From now on random bytes of this thread come from the seed, and its clock stands still.
pub(crate) fn begin(seed: u64) {
    NOW_NS.set(EPOCH_NS);
    STATE.set(Some(seed));
}

/// Virtual time goes on.
pub(crate) fn advance(elapsed: Duration) {
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(0);
    NOW_NS.set(EPOCH_NS + elapsed_ns);
}

/// The operating system answers again.
pub(crate) fn end() {
    STATE.set(None);
}

/// SplitMix64.
fn next(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, mixed ^ (mixed >> 31))
}

#[expect(
    unsafe_code,
    reason = "takes the place of the C library's function, for which there is no safe way; the caller's buffer is as long as it says"
)]
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    let Some(mut state) = STATE.get() else {
        // SAFETY: the arguments are passed on as they came.
        let read = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return isize::try_from(read).unwrap_or(-1);
    };
    let bytes = buffer.cast::<u8>();
    for at in 0..length {
        let drawn;
        (state, drawn) = next(state);
        // SAFETY: `at` is within the caller's buffer.
        unsafe { bytes.add(at).write(drawn.to_le_bytes()[0]) };
    }
    STATE.set(Some(state));
    isize::try_from(length).unwrap_or(-1)
}

#[expect(
    unsafe_code,
    reason = "takes the place of the C library's function, for which there is no safe way; the caller's structure is valid"
)]
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: c_int, into: *mut libc::timespec) -> c_int {
    if STATE.get().is_none() {
        // SAFETY: the arguments are passed on as they came.
        let asked = unsafe { libc::syscall(libc::SYS_clock_gettime, c_long::from(clock), into) };
        return c_int::try_from(asked).unwrap_or(-1);
    }
    let now_ns = NOW_NS.get();
    let time = libc::timespec {
        tv_sec: i64::try_from(now_ns / 1_000_000_000).unwrap_or(0),
        tv_nsec: i64::try_from(now_ns % 1_000_000_000).unwrap_or(0),
    };
    // SAFETY: the caller's structure is valid.
    unsafe { into.write(time) };
    0
}
