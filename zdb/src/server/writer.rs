//! The writing half of a connection: answers in order, together in one write where they are ready together.

use super::Server;
use super::connection::PACE_TICK;
use super::lookout::LookOut;
use super::pace::is_too_slow;
use super::reply::{Outgoing, Reply};
use super::values::PendingWrite;
use super::watch::Ran;
use bytes::Buf;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout};

/// Answers are written when so many bytes are ready, even if more will follow at once.
const WRITE_BYTES: usize = 1 << 20;

/// Answers queued on a connection.
const ANSWERS_MAX: usize = 256;

/// What becomes an answer.
pub(super) enum Outcome {
    Reply(Reply),
    Write(PendingWrite),
}

/// An answer in the queue.
pub(super) struct Queued {
    pub(super) outcome: Outcome,
    /// What those that WAIT are told when it is done.
    pub(super) ran: Option<Ran>,
    pub(super) _held: Option<Held>,
}

/// Budget of a request or its answer, until that is written.
pub(super) struct Held {
    pub(super) _connection: OwnedSemaphorePermit,
    pub(super) _server: OwnedSemaphorePermit,
}

/// SETs and DELs whose outcome the reader may have to wait for.
#[derive(Default)]
pub(super) struct Outstanding {
    writes: AtomicUsize,
    settled: Notify,
}

impl Outstanding {
    pub(super) fn begin(&self) {
        self.writes.fetch_add(1, Ordering::AcqRel);
    }

    fn end(&self) {
        if self.writes.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settled.notify_one();
        }
    }

    pub(super) fn is_none(&self) -> bool {
        self.writes.load(Ordering::Acquire) == 0
    }

    pub(super) async fn wait(&self) {
        while self.writes.load(Ordering::Acquire) > 0 {
            self.settled.notified().await;
        }
    }
}

/// Answers from the reader of a connection to its writer, in order. Both are one task in which the writer is always polled behind the
/// reader, so nobody is woken for what is put in: a task that wakes itself is polled once more for each request, maybe by another thread.
#[derive(Default)]
pub(super) struct Answers {
    state: Mutex<State>,
    room: Notify,
}

#[derive(Default)]
struct State {
    queued: VecDeque<Queued>,
    ended: bool,
}

impl Answers {
    /// Waits while there are too many.
    pub(super) async fn push(&self, queued: Queued) {
        loop {
            {
                let mut state = self.state.lock();
                if state.queued.len() < ANSWERS_MAX {
                    state.queued.push_back(queued);
                    return;
                }
            }
            self.room.notified().await;
        }
    }

    /// No more will come.
    pub(super) fn end(&self) {
        self.state.lock().ended = true;
    }

    fn try_next(&self) -> Option<Queued> {
        let mut state = self.state.lock();
        if state.queued.len() == ANSWERS_MAX {
            self.room.notify_one();
        }
        state.queued.pop_front()
    }

    /// `None` after the last.
    async fn next(&self) -> Option<Queued> {
        poll_fn(|_| match self.try_next() {
            Some(queued) => Poll::Ready(Some(queued)),
            None if self.state.lock().ended => Poll::Ready(None),
            None => Poll::Pending,
        })
        .await
    }
}

pub(super) struct Writer<W> {
    pub(super) write: W,
    pub(super) look_out: Arc<LookOut>,
    pub(super) answers: Arc<Answers>,
    pub(super) outstanding: Arc<Outstanding>,
    pub(super) server: Arc<Server>,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut outgoing = Outgoing::default();
        // Held until written: the values are in memory until then.
        let mut held = Vec::new();
        loop {
            // Write what is ready before waiting for what is not.
            let next = match self.answers.try_next() {
                Some(next) => Some(next),
                None => {
                    self.send(&mut outgoing).await?;
                    held.clear();
                    self.look_out.answered();
                    self.answers.next().await
                }
            };
            let Some(Queued {
                outcome,
                ran,
                _held: permit,
            }) = next
            else {
                // Nothing more is sent; with TLS this also tells the other side that nothing was cut off.
                let stall = self.server.config.stall_timeout;
                let _ = timeout(stall, self.write.shutdown()).await;
                return Ok(());
            };
            let reply = match outcome {
                Outcome::Reply(reply) => reply,
                Outcome::Write(write) => self.settle(write, &mut outgoing, &mut held).await?,
            };
            outgoing.push(&reply);
            held.extend(permit);
            if let Some(ran) = ran {
                self.server.watch.tell(ran);
            }
            if outgoing.pending_bytes() >= WRITE_BYTES {
                self.send(&mut outgoing).await?;
                held.clear();
            }
        }
    }

    async fn settle(
        &mut self,
        mut write: PendingWrite,
        outgoing: &mut Outgoing,
        held: &mut Vec<Held>,
    ) -> io::Result<Reply> {
        let reply = match write.try_reply() {
            Some(reply) => reply,
            None => {
                // The answers so far need not wait for the disk.
                self.send(outgoing).await?;
                held.clear();
                write.wait().await
            }
        };
        self.outstanding.end();
        match &reply {
            Reply::Bulk(_) => self.server.counters.written_bytes.add(write.value_bytes),
            Reply::Error(_) => self.server.counters.write_failed.add(1),
            _ => {}
        }
        Ok(reply)
    }

    async fn send(&mut self, outgoing: &mut Outgoing) -> io::Result<()> {
        outgoing.seal();
        if !outgoing.has_remaining() {
            return Ok(());
        }
        let stall = self.server.config.stall_timeout;
        let began = Instant::now();
        let mut moved = began;
        let mut sent = 0;
        while outgoing.has_remaining() {
            // The deadline is for progress, not for the whole: a slow client may take its time, unless others wait for its room.
            match timeout(PACE_TICK, self.write.write_buf(outgoing)).await {
                Ok(written) => match written? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    count => {
                        sent += count;
                        moved = Instant::now();
                    }
                },
                Err(_) if moved.elapsed() >= stall => return Err(io::ErrorKind::TimedOut.into()),
                Err(_) => {}
            }
            let others_wait = self.server.waiting.load(Ordering::Relaxed) > 0;
            if others_wait && is_too_slow(began.elapsed(), sent as u64, moved.elapsed()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.server.counters.sent_bytes.add(sent);
        timeout(stall, self.write.flush()).await?
    }
}
