//! One connection: the reader task parses and decides, the writer task answers in order.

use super::parser::Parser;
use super::reply::{NAMESPACE_REMOVED, Outgoing, Reply, engine_error};
use super::session::{Answering, Session};
use super::{BUDGET_UNIT, Server};
use bytes::{Buf, BytesMut};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

/// Bytes read at once when no larger value is expected.
const READ_BYTES: usize = 16 << 10;
/// Answers queued on a connection.
const ANSWERS_MAX: usize = 1024;
/// Answers are written when so many bytes are ready, even if more will follow at once.
const WRITE_BYTES: usize = 1 << 20;
/// A client that was not let in yet sends no more than this in a request.
const STRANGER_REQUEST_BYTES_MAX: usize = 4096;

pub(super) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Too many connections: say so and close.
pub(super) async fn refuse(stream: Accepted) {
    let text = b"-Too many connections\r\n";
    // Best effort, without TLS: a client that cannot read it sees a closed connection all the same.
    let _ = match stream {
        Accepted::Tcp(stream) => stream.try_write(text),
        Accepted::Unix(stream) => stream.try_write(text),
    };
}

/// Serve a connection until it ends.
pub(super) async fn run(server: Arc<Server>, stream: Accepted, client: u64) {
    let ended = match (stream, server.config.tls.clone()) {
        (Accepted::Tcp(stream), None) => talk(server, stream, client).await,
        (Accepted::Unix(stream), None) => talk(server, stream, client).await,
        (Accepted::Tcp(stream), Some(tls)) => talk_tls(server, tls, stream, client).await,
        (Accepted::Unix(stream), Some(tls)) => talk_tls(server, tls, stream, client).await,
    };
    if let Err(error) = ended {
        tracing::debug!(client, %error, "a connection ended");
    }
}

async fn talk_tls<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    server: Arc<Server>,
    tls: Arc<rustls::ServerConfig>,
    stream: S,
    client: u64,
) -> io::Result<()> {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let deadline = server.config.handshake_timeout;
    let stream = timeout(deadline, acceptor.accept(stream)).await??;
    talk(server, stream, client).await
}

/// An answer in the queue, with the budget it holds.
struct Queued {
    answering: Answering,
    _held: Option<Held>,
}

/// Budget of a request and its answer.
struct Held {
    _connection: OwnedSemaphorePermit,
    _server: OwnedSemaphorePermit,
}

/// SETs and DELs whose outcome the reader may have to wait for.
#[derive(Default)]
struct Outstanding {
    writes: AtomicUsize,
    settled: Notify,
}

impl Outstanding {
    fn begin(&self) {
        self.writes.fetch_add(1, Ordering::AcqRel);
    }

    fn end(&self) {
        if self.writes.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settled.notify_one();
        }
    }

    async fn wait(&self) {
        while self.writes.load(Ordering::Acquire) > 0 {
            self.settled.notified().await;
        }
    }
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    server: Arc<Server>,
    stream: S,
    client: u64,
) -> io::Result<()> {
    let (read, write) = tokio::io::split(stream);
    let (queue, queued) = mpsc::channel(ANSWERS_MAX);
    let outstanding = Arc::new(Outstanding::default());
    let stall = server.config.stall_timeout;
    let writer = Writer {
        write,
        queued,
        outstanding: Arc::clone(&outstanding),
        stall,
    };
    let units = server.config.connection_inflight_bytes / BUDGET_UNIT;
    let mut reader = Reader {
        read,
        session: Session::new(Arc::clone(&server), client),
        server,
        parser: Parser::default(),
        buffer: BytesMut::new(),
        queue,
        outstanding,
        budget: Arc::new(Semaphore::new(units)),
        budget_units: units,
        begun: tokio::time::Instant::now(),
    };
    let reading = async move { reader.run().await };
    // The writer ends after the last answer once the reader has dropped the queue; when the writer fails, reading is pointless.
    let mut writing = std::pin::pin!(writer.run());
    tokio::select! {
        read = reading => {
            writing.await?;
            read
        }
        written = &mut writing => written,
    }
}

struct Reader<S> {
    read: ReadHalf<S>,
    session: Session,
    server: Arc<Server>,
    parser: Parser,
    buffer: BytesMut,
    queue: mpsc::Sender<Queued>,
    outstanding: Arc<Outstanding>,
    budget: Arc<Semaphore>,
    budget_units: usize,
    begun: tokio::time::Instant,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    async fn run(&mut self) -> io::Result<()> {
        let mut held = None;
        loop {
            self.parser.request_bytes_max =
                (!self.session.is_let_in()).then_some(STRANGER_REQUEST_BYTES_MAX);
            match self.parser.next(&mut self.buffer) {
                Ok(Some(request)) => {
                    let held = held.take();
                    if !self.handle(request, held).await? {
                        return Ok(());
                    }
                }
                Ok(None) => {
                    // The budget is taken before the payload is.
                    if held.is_none() && self.parser.announced_bytes() > READ_BYTES {
                        held = Some(self.hold(self.parser.announced_bytes()).await?);
                    }
                    if !self.fill().await? {
                        return Ok(());
                    }
                }
                Err(malformed) => {
                    let reply = Reply::error(malformed.text);
                    self.answer(Answering::Now(reply), None).await?;
                    if malformed.close {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Read more bytes; `false` at the end of the stream.
    async fn fill(&mut self) -> io::Result<bool> {
        let wanted = self.parser.wanted_bytes(&self.buffer);
        // Exactly what a large value needs, so that it has its buffer for itself.
        self.buffer.reserve(if wanted > READ_BYTES {
            wanted
        } else {
            READ_BYTES
        });
        let read = self.read.read_buf(&mut self.buffer);
        let count = if !self.session.is_let_in() {
            let deadline = self.begun + self.server.config.handshake_timeout;
            tokio::time::timeout_at(deadline, read).await??
        } else if self.parser.is_inside() {
            timeout(self.server.config.stall_timeout, read).await??
        } else {
            read.await?
        };
        Ok(count > 0)
    }

    /// Carry out a request; `false` when the connection is to be closed after the answer.
    async fn handle(&mut self, request: Vec<bytes::Bytes>, held: Option<Held>) -> io::Result<bool> {
        if self.session.waits_for_writes(&request) {
            self.outstanding.wait().await;
        }
        let answer_bytes = self.session.answer_bytes(&request);
        let held = match held {
            None if answer_bytes > READ_BYTES => Some(self.hold(answer_bytes).await?),
            held => held,
        };
        let answering = self.session.carry_out(request).await;
        if matches!(answering, Answering::Set(_) | Answering::Delete(_)) {
            self.outstanding.begin();
        }
        let removed =
            matches!(&answering, Answering::Now(Reply::Error(text)) if text == NAMESPACE_REMOVED);
        self.answer(answering, held).await?;
        Ok(!removed)
    }

    async fn answer(&self, answering: Answering, held: Option<Held>) -> io::Result<()> {
        let queued = Queued {
            answering,
            _held: held,
        };
        let sent = self.queue.send(queued).await;
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn hold(&self, bytes: usize) -> io::Result<Held> {
        let units = bytes
            .div_ceil(BUDGET_UNIT)
            .clamp(1, self.budget_units.max(1));
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        let both = async {
            let connection = Arc::clone(&self.budget).acquire_many_owned(units).await;
            let server = Arc::clone(&self.server.budget)
                .acquire_many_owned(units)
                .await;
            Ok(Held {
                _connection: connection.map_err(closed)?,
                _server: server.map_err(closed)?,
            })
        };
        timeout(self.server.config.stall_timeout, both).await?
    }
}

struct Writer<S> {
    write: WriteHalf<S>,
    queued: mpsc::Receiver<Queued>,
    outstanding: Arc<Outstanding>,
    stall: std::time::Duration,
}

impl<S: AsyncWrite + Unpin> Writer<S> {
    async fn run(mut self) -> io::Result<()> {
        let mut outgoing = Outgoing::default();
        // Held until written: the values are in memory until then.
        let mut held = Vec::new();
        loop {
            // Write what is ready before waiting for what is not.
            let next = match self.queued.try_recv() {
                Ok(next) => Some(next),
                Err(_) => {
                    self.send(&mut outgoing).await?;
                    held.clear();
                    self.queued.recv().await
                }
            };
            let Some(Queued {
                answering,
                _held: permit,
            }) = next
            else {
                // Nothing more is sent; with TLS this also tells the other side that nothing was cut off.
                let _ = timeout(self.stall, self.write.shutdown()).await;
                return Ok(());
            };
            let reply = self.settle(answering, &mut outgoing, &mut held).await?;
            outgoing.push(&reply);
            held.extend(permit);
            if outgoing.pending_bytes() >= WRITE_BYTES {
                self.send(&mut outgoing).await?;
                held.clear();
            }
        }
    }

    async fn settle(
        &mut self,
        answering: Answering,
        outgoing: &mut Outgoing,
        held: &mut Vec<Held>,
    ) -> io::Result<Reply> {
        let mut answer = match answering {
            Answering::Now(reply) => return Ok(reply),
            Answering::Set(answer) | Answering::Delete(answer) => answer,
        };
        let outcome = match answer.try_now() {
            Some(outcome) => outcome,
            None => {
                // The answers so far need not wait for the disk.
                self.send(outgoing).await?;
                held.clear();
                answer.wait().await
            }
        };
        self.outstanding.end();
        Ok(match outcome {
            Ok(Some(key)) => Reply::Bulk(key),
            Ok(None) => answer.reply_without_key(),
            Err(error) => answer.error(&error).unwrap_or_else(|| engine_error(&error)),
        })
    }

    async fn send(&mut self, outgoing: &mut Outgoing) -> io::Result<()> {
        outgoing.seal();
        if !outgoing.has_remaining() {
            return Ok(());
        }
        while outgoing.has_remaining() {
            // The deadline is for progress, not for the whole: a slow client may take its time.
            let wrote = timeout(self.stall, self.write.write_buf(outgoing)).await??;
            if wrote == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        timeout(self.stall, self.write.flush()).await?
    }
}
