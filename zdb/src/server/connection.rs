//! One connection: the reader parses and decides, the [`super::writer`] answers in order; both are one task.

use super::buffers;
use super::command::Command;
use super::lookout::{LookOut, Source, Watched};
use super::pace::is_too_slow;
use super::parser::Parser;
use super::reply::Reply;
use super::session::{Answering, Session};
use super::values::Values;
use super::writer::{Answers, Held, Outcome, Outstanding, Queued, Writer};
use super::{BUDGET_UNIT, Server};
use crate::engine::{Caller, value_residue};
use bytes::{Bytes, BytesMut};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

/// Bytes read at once: few for a connection that says little, more while it fills what it is given.
const READ_BYTES_FIRST: usize = 4 << 10;
const READ_BYTES_MAX: usize = 16 << 10;
/// Requests and answers up to this size are not counted; the length of the queue bounds them.
const UNCOUNTED_BYTES: usize = 256;
/// A client that was not let in yet sends no more than this in a request.
const STRANGER_REQUEST_BYTES_MAX: usize = 4096;
/// Room is taken for so much more than was announced, so that small arguments behind a value need none of their own.
const ROOM_AHEAD_BYTES: usize = 32 << 10;
/// For a request that has room and announces more than that.
const MORE_ROOM_PATIENCE: Duration = Duration::from_secs(3);
/// How often the pace of a large transfer is looked at.
pub(super) const PACE_TICK: Duration = Duration::from_secs(1);
/// After bytes that are no request so much more is read and dropped, for so long, so that the client gets to see the error.
const DROPPED_BYTES_MAX: usize = 16 << 20;
const DROPPING_MAX: Duration = Duration::from_secs(5);

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
        (Accepted::Tcp(stream), None) => {
            let (read, write) = stream.into_split();
            talk(server, read, write, client).await
        }
        (Accepted::Unix(stream), None) => {
            let (read, write) = stream.into_split();
            talk(server, read, write, client).await
        }
        // The futures of TLS are large and not all connections have it.
        (Accepted::Tcp(stream), Some(tls)) => Box::pin(talk_tls(server, tls, stream, client)).await,
        (Accepted::Unix(stream), Some(tls)) => {
            Box::pin(talk_tls(server, tls, stream, client)).await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(client, %error, "a connection ended");
    }
}

async fn talk_tls<S: AsyncRead + AsyncWrite + Unpin>(
    server: Arc<Server>,
    tls: Arc<rustls::ServerConfig>,
    stream: S,
    client: u64,
) -> io::Result<()> {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let deadline = server.config.handshake_timeout;
    let stream = timeout(deadline, acceptor.accept(stream)).await??;
    let (read, write) = tokio::io::split(stream);
    talk(server, read, write, client).await
}

async fn talk<R: Source, W: AsyncWrite + Unpin>(
    server: Arc<Server>,
    read: R,
    write: W,
    client: u64,
) -> io::Result<()> {
    let answers = Arc::new(Answers::default());
    let outstanding = Arc::new(Outstanding::default());
    let look_out = Arc::new(LookOut::of(&read));
    let writer = Writer {
        write,
        look_out: Arc::clone(&look_out),
        answers: Arc::clone(&answers),
        outstanding: Arc::clone(&outstanding),
        server: Arc::clone(&server),
    };
    let units = server.config.connection_inflight_bytes / BUDGET_UNIT;
    let mut reader = Reader {
        read: Watched::new(read, Arc::clone(&look_out)),
        look_out: Arc::clone(&look_out),
        session: Session::new(Arc::clone(&server), client),
        server,
        parser: Parser::default(),
        buffer: BytesMut::new(),
        read_bytes: READ_BYTES_FIRST,
        answers,
        outstanding,
        budget: Arc::new(Semaphore::new(units)),
        budget_units: units,
        arrival: None,
        begun: Instant::now(),
    };
    let mut writing = pin!(writer.run());
    let ended = {
        let mut reading = pin!(reader.run());
        poll_fn(|context| {
            loop {
                // The writer is always polled behind the reader: see `Answers`.
                if let Poll::Ready(ended) = reading.as_mut().poll(context) {
                    return Poll::Ready(Ok(ended));
                }
                // When nothing can be answered any more, reading is pointless.
                if let Poll::Ready(written) = writing.as_mut().poll(context) {
                    return Poll::Ready(Err(written));
                }
                if !look_out.goes_on() {
                    return Poll::Pending;
                }
            }
        })
        .await
    };
    let ended = match ended {
        Ok(ended) => ended,
        Err(written) => return written,
    };
    // The writer ends after the last answer.
    reader.answers.end();
    writing.await?;
    if matches!(ended, Ok(Ending::Malformed)) {
        reader.drop_the_rest().await;
    }
    ended.map(|_| ())
}

/// Why reading ended.
enum Ending {
    /// The client or the server wants no more.
    Done,
    /// What comes cannot be understood.
    Malformed,
}

/// A large request of which a part is here.
struct Arrival {
    began: Instant,
    /// Of its bytes so many have room.
    bytes: usize,
    room: OwnedSemaphorePermit,
}

struct Reader<R> {
    read: Watched<R>,
    look_out: Arc<LookOut>,
    session: Session,
    server: Arc<Server>,
    parser: Parser,
    buffer: BytesMut,
    read_bytes: usize,
    answers: Arc<Answers>,
    outstanding: Arc<Outstanding>,
    budget: Arc<Semaphore>,
    budget_units: usize,
    arrival: Option<Arrival>,
    begun: Instant,
}

impl<R: Source> Reader<R> {
    async fn run(&mut self) -> io::Result<Ending> {
        loop {
            self.parser.request_bytes_max =
                (!self.session.is_let_in()).then_some(STRANGER_REQUEST_BYTES_MAX);
            match self.parser.next(&mut self.buffer) {
                Ok(Some(request)) => {
                    if !self.handle(request).await? {
                        return Ok(Ending::Done);
                    }
                }
                Ok(None) => {
                    let shutdown = self.server.shutdown.clone();
                    let more = tokio::select! {
                        biased;
                        more = self.fill() => more?,
                        () = shutdown.cancelled() => false,
                    };
                    if !more {
                        return Ok(Ending::Done);
                    }
                }
                Err(malformed) => {
                    let reply = Outcome::Reply(Reply::error(malformed.text));
                    self.answer(reply, None, None).await;
                    if malformed.close {
                        return Ok(Ending::Malformed);
                    }
                }
            }
        }
    }

    /// Read more bytes; `false` at the end of the stream.
    async fn fill(&mut self) -> io::Result<bool> {
        let wanted = self.parser.wanted_bytes(&self.buffer);
        let announced = self.parser.announced_bytes();
        let arrived = announced.saturating_sub(wanted);
        // Only a client that really sends a large request gets room for it: the first bytes come without.
        if announced > READ_BYTES_MAX && arrived >= READ_BYTES_FIRST {
            self.make_room(announced).await?;
        }
        if self.arrival.is_some() && wanted > READ_BYTES_MAX {
            // Exactly what a large value needs, so that it has its buffer for itself and is never moved.
            if self.buffer.capacity() - self.buffer.len() < wanted {
                let residue = self.parser.key().map_or(0, value_residue);
                let mut whole = buffers::take(self.buffer.len() + wanted, residue);
                whole.extend_from_slice(&self.buffer);
                self.buffer = whole;
            }
        } else {
            self.buffer.reserve(self.read_bytes);
        }
        let count = self.receive().await?;
        self.server.counters.received_bytes.add(count);
        if count >= self.read_bytes {
            self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
        }
        Ok(count > 0)
    }

    /// Room for a request that has announced so many bytes by now.
    async fn make_room(&mut self, announced: usize) -> io::Result<()> {
        let most = self.server.config.arriving_bytes / BUDGET_UNIT;
        let held = self.arrival.as_ref().map_or(0, |arrival| arrival.bytes);
        if announced <= held {
            return Ok(());
        }
        let bytes = announced + ROOM_AHEAD_BYTES;
        let (patience, held) = match held {
            0 => (self.server.config.stall_timeout, 0),
            // Who holds room and wants more may wait for others that do the same: not for long.
            held => (MORE_ROOM_PATIENCE, units(held, most)),
        };
        let room = take(
            &self.server,
            &self.server.arriving,
            units(bytes, most) - held,
        );
        let room = timeout(patience, room).await??;
        match &mut self.arrival {
            Some(arrival) => {
                arrival.bytes = bytes;
                arrival.room.merge(room);
            }
            None => {
                self.arrival = Some(Arrival {
                    began: Instant::now(),
                    bytes,
                    room,
                });
            }
        }
        Ok(())
    }

    /// One read, with its deadline.
    async fn receive(&mut self) -> io::Result<usize> {
        let config = &self.server.config;
        if !self.session.is_let_in() {
            let deadline = self.begun + config.handshake_timeout;
            return timeout_at(deadline, self.read.read_buf(&mut self.buffer)).await?;
        }
        if !self.parser.is_inside() && self.buffer.is_empty() {
            return self.read.read_buf(&mut self.buffer).await;
        }
        let Some(arrival) = &self.arrival else {
            return timeout(config.stall_timeout, self.read.read_buf(&mut self.buffer)).await?;
        };
        let still = Instant::now();
        loop {
            let others_wait = self.server.waiting.load(Ordering::Relaxed) > 0;
            let wanted = self.parser.wanted_bytes(&self.buffer);
            let bytes = self.parser.announced_bytes().saturating_sub(wanted) as u64;
            let elapsed = arrival.began.elapsed();
            if others_wait && is_too_slow(elapsed, bytes, still.elapsed()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match timeout(PACE_TICK, self.read.read_buf(&mut self.buffer)).await {
                Ok(read) => return read,
                Err(_) if still.elapsed() < config.stall_timeout => {}
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// Carry out a request; `false` when the connection is to be closed after the answer.
    async fn handle(&mut self, request: Vec<Bytes>) -> io::Result<bool> {
        let bytes = request.iter().map(Bytes::len).sum();
        let held = self.hold(bytes).await?;
        self.arrival = None;
        let Some(command) = request.first().and_then(|name| Command::named(name)) else {
            self.server.counters.failed.add(1);
            let reply = Outcome::Reply(Reply::error("Command not supported"));
            self.answer(reply, held, None).await;
            return Ok(true);
        };
        self.server.counters.executed.add(1);
        if !command.may_overtake_writes() {
            self.outstanding.wait().await;
        }
        let held = match self.session.reading_bytes(command, &request) {
            0 => held,
            reading => {
                drop(held);
                self.hold(reading).await?
            }
        };
        let caller = if self.buffer.is_empty() && self.outstanding.is_none() {
            Caller::Alone
        } else {
            Caller::Busy
        };
        let answering = if command == Command::Wait {
            match self.carry_out_wait(request).await? {
                Some(answering) => answering,
                None => return Ok(false),
            }
        } else {
            self.session.carry_out(command, request, caller).await
        };
        let mut last = false;
        let outcome = match answering {
            Answering::Write(write) => {
                self.outstanding.begin();
                if write.is_known() {
                    self.look_out.expect();
                }
                Outcome::Write(write)
            }
            Answering::Values(values) => return self.read_values(command, values).await,
            Answering::Now(reply) => Outcome::Reply(reply),
            Answering::Last(reply) => {
                last = true;
                Outcome::Reply(reply)
            }
        };
        let held = match &outcome {
            Outcome::Reply(reply) if held.is_none() => self.hold(reply.bytes()).await?,
            _ => held,
        };
        self.answer(outcome, held, Some(command)).await;
        Ok(!last)
    }

    /// GET and MGET: room for a value is taken before the value is read.
    async fn read_values(&mut self, command: Command, values: Values) -> io::Result<bool> {
        if values.array {
            let header = Outcome::Reply(Reply::ArrayHeader(values.keys.len()));
            self.answer(header, None, None).await;
        }
        let mut last = false;
        for (number, key) in values.keys.iter().enumerate() {
            let held = self.hold(values.answer_bytes(key)).await?;
            let reply = values.read(key).await;
            match &reply {
                Reply::Bulk(value) => self.server.counters.read_bytes.add(value.len()),
                Reply::Error(_) => self.server.counters.read_failed.add(1),
                _ => {}
            }
            last |= reply.is_removal();
            let ran = (number + 1 == values.keys.len()).then_some(command);
            self.answer(Outcome::Reply(reply), held, ran).await;
        }
        Ok(!last)
    }

    /// WAIT takes long: notice when the client or the server goes meanwhile.
    async fn carry_out_wait(&mut self, request: Vec<Bytes>) -> io::Result<Option<Answering>> {
        let mut waiting =
            std::pin::pin!(self.session.carry_out(Command::Wait, request, Caller::Busy));
        loop {
            // What the client sends meanwhile is kept, but not much of it.
            let room = READ_BYTES_MAX.saturating_sub(self.buffer.len());
            self.buffer.reserve(room.min(READ_BYTES_FIRST));
            tokio::select! {
                answering = &mut waiting => return Ok(Some(answering)),
                () = self.server.shutdown.cancelled() => return Ok(None),
                read = self.read.read_buf(&mut self.buffer), if room >= READ_BYTES_FIRST => {
                    let count = read?;
                    self.server.counters.received_bytes.add(count);
                    if count == 0 {
                        return Ok(None);
                    }
                }
            }
        }
    }

    async fn answer(&self, outcome: Outcome, held: Option<Held>, command: Option<Command>) {
        let queued = Queued {
            outcome,
            ran: command.and_then(|command| self.session.ran(command)),
            _held: held,
        };
        self.answers.push(queued).await;
    }

    /// Room for so many bytes, of this connection and of the server.
    async fn hold(&self, bytes: usize) -> io::Result<Option<Held>> {
        if bytes <= UNCOUNTED_BYTES {
            return Ok(None);
        }
        let units = units(bytes, self.budget_units);
        let connection = match Arc::clone(&self.budget).try_acquire_many_owned(units) {
            Ok(permit) => permit,
            Err(_) => {
                let room = Arc::clone(&self.budget).acquire_many_owned(units);
                let room = timeout(self.server.config.stall_timeout, room).await?;
                room.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?
            }
        };
        let room = take(&self.server, &self.server.budget, units);
        let server = timeout(self.server.config.stall_timeout, room).await??;
        Ok(Some(Held {
            _connection: connection,
            _server: server,
        }))
    }

    /// Closing while bytes are unread would take the error from the client before it was seen.
    async fn drop_the_rest(&mut self) {
        let dropping = async {
            let mut dropped = 0;
            while dropped < DROPPED_BYTES_MAX {
                self.buffer.clear();
                self.buffer.reserve(READ_BYTES_FIRST);
                match self.read.read_buf(&mut self.buffer).await {
                    Ok(1..) => dropped += self.buffer.len(),
                    Ok(0) | Err(_) => return,
                }
            }
        };
        let _ = timeout(DROPPING_MAX, dropping).await;
    }
}

/// One that is larger than the whole budget takes all of it.
fn units(bytes: usize, most: usize) -> u32 {
    let units = bytes.div_ceil(BUDGET_UNIT).clamp(1, most.max(1));
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// Take from a budget of the server, and let those that hold it know when somebody waits.
async fn take(
    server: &Server,
    budget: &Arc<Semaphore>,
    units: u32,
) -> io::Result<OwnedSemaphorePermit> {
    struct Waiting<'a>(&'a Server);
    impl Drop for Waiting<'_> {
        fn drop(&mut self) {
            self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
    if let Ok(permit) = Arc::clone(budget).try_acquire_many_owned(units) {
        return Ok(permit);
    }
    server.waiting.fetch_add(1, Ordering::Relaxed);
    let _waiting = Waiting(server);
    let taken = Arc::clone(budget).acquire_many_owned(units).await;
    taken.map_err(|_| io::ErrorKind::BrokenPipe.into())
}
