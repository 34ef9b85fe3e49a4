//! Being there when a client that is alone asks again.
//!
//! Such a client waits for each answer before it asks on, and its requests are carried out, disk and all, by the thread that reads them. That
//! thread has left the runtime for it: nothing is kept waiting when it looks for the next request for a moment more, and to find it there is quicker than
//! to be woken, through another thread, once it has come.
//!
//! ```text
//! Resting ─(written by this thread)─> Expecting ─(answer sent)─> Answered ─> Looking ─(bytes, or too long)─> Resting
//! ```
//!
//! Invariant: the task rests (its future returns `Pending`) only in `Resting`, and whoever reads has then asked the runtime to be woken.

use parking_lot::Mutex;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{tcp, unix};

/// How long the next request is looked for: a client on the same machine needs less for it.
const LOOK_OUT: Duration = Duration::from_micros(60);
/// So many requests in a row are found by looking; then the runtime has a turn.
const FOUND_IN_A_ROW: u32 = 64;
/// So often in a row nothing came, before it is looked for only now and then...
const MISSED_IN_A_ROW: u32 = 4;
/// ...once in so many requests.
const MISSED_PAUSE: u32 = 64;
/// Bytes taken at once while looking; what is longer comes through the runtime.
const TAKEN_BYTES_MAX: usize = 16 << 10;

/// One thread of all looks: two would take the cores that their clients need.
static SOMEBODY_LOOKS: AtomicBool = AtomicBool::new(false);

/// A stream that may have bytes the runtime does not know of yet.
pub(super) trait Source: AsyncRead + Unpin {
    /// Its descriptor, which never blocks; `None` if the bytes that come through it are not what is read.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

impl Source for tcp::OwnedReadHalf {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_ref().as_fd())
    }
}

impl Source for unix::OwnedReadHalf {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_ref().as_fd())
    }
}

/// TLS.
impl<S: AsyncRead + Unpin> Source for tokio::io::ReadHalf<S> {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Resting,
    Expecting,
    Answered,
    Looking { since: Instant },
}

#[derive(Debug)]
struct Inner {
    state: State,
    found: u32,
    missed: u32,
    /// Requests still to pass without looking.
    pause: u32,
}

/// Shared by the two halves of a connection.
#[derive(Debug)]
pub(super) struct LookOut {
    /// Is there a descriptor to look at?
    can_look: bool,
    inner: Mutex<Inner>,
}

/// The right to look, given back when the state that holds it ends.
fn take_turn() -> bool {
    !SOMEBODY_LOOKS.swap(true, Ordering::AcqRel)
}

fn give_turn_back() {
    SOMEBODY_LOOKS.store(false, Ordering::Release);
}

impl LookOut {
    pub(super) fn of(source: &impl Source) -> Self {
        Self {
            can_look: source.descriptor().is_some(),
            inner: Mutex::new(Inner {
                state: State::Resting,
                found: 0,
                missed: 0,
                pause: 0,
            }),
        }
    }

    /// A write was carried out by this thread.
    pub(super) fn expect(&self) {
        let mut inner = self.inner.lock();
        if self.can_look && inner.state == State::Resting {
            inner.state = State::Expecting;
        }
    }

    /// All answers are sent.
    pub(super) fn answered(&self) {
        let mut inner = self.inner.lock();
        if inner.state == State::Expecting {
            inner.state = State::Answered;
        }
    }

    /// Both halves wait: is there reason to poll them again at once?
    pub(super) fn goes_on(&self) -> bool {
        let mut inner = self.inner.lock();
        let state = inner.state;
        match state {
            State::Resting => {
                inner.found = 0;
                return false;
            }
            State::Answered if inner.may_look() && take_turn() => {
                inner.state = State::Looking {
                    since: Instant::now(),
                };
            }
            State::Expecting | State::Answered => inner.state = State::Resting,
            State::Looking { since } if since.elapsed() < LOOK_OUT => {
                drop(inner);
                std::thread::yield_now();
            }
            State::Looking { .. } => inner.missed(),
        }
        true
    }
}

impl Drop for LookOut {
    fn drop(&mut self) {
        if matches!(self.inner.get_mut().state, State::Looking { .. }) {
            give_turn_back();
        }
    }
}

impl Inner {
    fn may_look(&mut self) -> bool {
        if self.found >= FOUND_IN_A_ROW {
            return false;
        }
        self.pause = self.pause.saturating_sub(1);
        self.pause == 0
    }

    fn found(&mut self) {
        self.state = State::Resting;
        give_turn_back();
        self.found += 1;
        self.missed = 0;
    }

    fn missed(&mut self) {
        self.state = State::Resting;
        give_turn_back();
        self.missed += 1;
        if self.missed >= MISSED_IN_A_ROW {
            self.pause = MISSED_PAUSE;
        }
    }
}

/// The reading half of a connection that is looked out for.
pub(super) struct Watched<R> {
    read: R,
    look_out: Arc<LookOut>,
}

impl<R: Source> Watched<R> {
    pub(super) fn new(read: R, look_out: Arc<LookOut>) -> Self {
        Self { read, look_out }
    }
}

impl<R: Source> AsyncRead for Watched<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.look_out.inner.lock();
        match (inner.state, self.read.descriptor()) {
            (State::Looking { .. }, Some(descriptor)) => {
                let count = ready!(take_now(descriptor, buffer));
                inner.found();
                Poll::Ready(count)
            }
            // Nothing can have come before the answer is sent; then it is looked for first.
            (State::Expecting | State::Answered, Some(_)) => Poll::Pending,
            _ => {
                drop(inner);
                Pin::new(&mut self.read).poll_read(context, buffer)
            }
        }
    }
}

/// What has come, the end of the stream among it.
fn take_now(descriptor: BorrowedFd<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    let bytes = buffer.remaining().min(TAKEN_BYTES_MAX);
    match rustix::io::read(descriptor, buffer.initialize_unfilled_to(bytes)) {
        Ok(count) => {
            buffer.advance(count);
            Poll::Ready(Ok(()))
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Poll::Pending,
        Err(errno) => Poll::Ready(Err(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::{FOUND_IN_A_ROW, LookOut, MISSED_IN_A_ROW, MISSED_PAUSE, State, Watched};
    use std::io::ErrorKind;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Waker};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::net::unix::OwnedReadHalf;

    struct Connection {
        client: UnixStream,
        read: Watched<OwnedReadHalf>,
        look_out: Arc<LookOut>,
    }

    impl Connection {
        fn new() -> Self {
            let (client, server) = UnixStream::pair().unwrap();
            let (read, _) = server.into_split();
            let look_out = Arc::new(LookOut::of(&read));
            Self {
                client,
                read: Watched::new(read, Arc::clone(&look_out)),
                look_out,
            }
        }

        /// One read, without waiting: the bytes, or that there are none yet.
        fn read_now(&mut self) -> Option<Vec<u8>> {
            let mut bytes = Vec::new();
            let reading = pin!(self.read.read_buf(&mut bytes));
            match reading.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(count) => {
                    assert_eq!(count.unwrap(), bytes.len());
                    Some(bytes)
                }
                Poll::Pending => None,
            }
        }

        fn state(&self) -> State {
            self.look_out.inner.lock().state
        }

        /// A request was carried out and answered: does somebody look for the next?
        fn looks(&self) -> bool {
            self.look_out.expect();
            self.look_out.answered();
            assert!(self.look_out.goes_on());
            matches!(self.state(), State::Looking { .. })
        }
    }

    /// All in one, since one thread of the process looks.
    #[tokio::test]
    async fn what_comes_while_somebody_looks_is_found_and_else_the_runtime_tells() {
        let mut connection = Connection::new();
        // The runtime has not had a turn: it does not know of these bytes.
        for _ in 0..FOUND_IN_A_ROW {
            connection.client.try_write(b"asked").unwrap();
            assert_eq!(connection.read_now(), None);
            connection.look_out.expect();
            // First the answer.
            assert_eq!(connection.read_now(), None);
            assert!(connection.looks());
            assert_eq!(connection.read_now().unwrap(), b"asked");
            assert_eq!(connection.state(), State::Resting);
        }
        assert!(!connection.looks(), "the runtime has a turn");
        assert!(!connection.look_out.goes_on());
        // Not sent yet: nothing to look for.
        connection.look_out.expect();
        assert!(connection.look_out.goes_on());
        assert_eq!(connection.state(), State::Resting);
        assert!(!connection.look_out.goes_on());

        // Another one does not look meanwhile, but does when the first is gone.
        let other = Connection::new();
        assert!(connection.looks() && !other.looks());
        drop(connection);
        assert!(other.looks());
        drop(other);

        let mut connection = Connection::new();
        for _ in 0..MISSED_IN_A_ROW {
            assert!(connection.looks());
            while connection.look_out.goes_on() {
                assert_eq!(connection.read_now(), None);
            }
            assert_eq!(connection.state(), State::Resting);
        }
        let looked = (0..MISSED_PAUSE * 3).filter(|_| {
            let looks = connection.looks();
            while connection.look_out.goes_on() {}
            looks
        });
        assert_eq!(looked.count(), 3, "now and then");
        // At rest the runtime tells of what comes.
        connection.client.try_write(b"later").unwrap();
        let mut bytes = Vec::new();
        let told = tokio::time::timeout(
            Duration::from_secs(20),
            connection.read.read_buf(&mut bytes),
        );
        assert_eq!(
            (told.await.unwrap().unwrap(), &bytes[..]),
            (5, &b"later"[..])
        );

        let mut connection = Connection::new();
        assert!(connection.looks());
        connection.client.shutdown().await.unwrap();
        let mut bytes = Vec::new();
        let reading = pin!(connection.read.read_buf(&mut bytes));
        let end = reading.poll(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(end, Poll::Ready(Ok(0))), "the end is seen");
        assert_eq!(connection.state(), State::Resting);
    }

    #[tokio::test]
    async fn nobody_looks_where_bytes_are_not_what_is_read() {
        let (stream, _other) = tokio::io::duplex(64);
        let (read, _write) = tokio::io::split(stream);
        let look_out = Arc::new(LookOut::of(&read));
        look_out.expect();
        look_out.answered();
        assert!(!look_out.goes_on());
        let mut read = Watched::new(read, look_out);
        let mut bytes = [0; 4];
        let reading = pin!(read.read_exact(&mut bytes));
        assert!(
            reading
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_pending()
        );
        drop(_other);
        let ended = read.read_exact(&mut bytes).await;
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
