//! From a listener to a stream of finished TLS connections.
//!
//! Handshakes run beside each other, each with a deadline, so that a slow client blocks nobody. Connections of strangers (no client
//! certificate) have few places and a short life. All end when `kill` fires.

use super::CONNECTIONS_MAX;
use crate::dial::ByteStream;
use crate::identity::PeerIdentity;
use crate::tls;
use futures::Stream;
use rustls::ServerConfig;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// From the first byte to the end of the TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// A stranger has so long to join.
const STRANGER_LIFETIME: Duration = Duration::from_secs(30);
/// Most strangers at once.
const STRANGERS_MAX: usize = 64;
/// After an accept that failed (no file descriptors): the listener would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end; `None`: a stranger. In the extensions of every request.
#[derive(Debug, Clone)]
pub(super) struct ConnectedPeer(pub(super) Option<PeerIdentity>);

/// One served connection. Holds its places until it is dropped.
pub(super) struct Connection {
    stream: Box<dyn ByteStream>,
    peer: ConnectedPeer,
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
    _places: Vec<OwnedSemaphorePermit>,
}

/// A connection whose other end needs no handshake to be known.
pub(super) fn known(
    stream: Box<dyn ByteStream>,
    peer: Option<PeerIdentity>,
    kill: &CancellationToken,
) -> Connection {
    Connection {
        stream,
        peer: ConnectedPeer(peer),
        end: Box::pin(kill.clone().cancelled_owned()),
        _places: Vec::new(),
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectedPeer;

    fn connect_info(&self) -> ConnectedPeer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            // Polled again it would panic; a connection that ended stays ended.
            self.end = Box::pin(std::future::ready(()));
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

struct Acceptor {
    tls: TlsAcceptor,
    strangers: Arc<Semaphore>,
    kill: CancellationToken,
}

/// Accepts until the stream is dropped or `kill` fires.
pub(super) fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    kill: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(16);
    let acceptor = Arc::new(Acceptor {
        tls: TlsAcceptor::from(config),
        strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
        kill: kill.clone(),
    });
    tokio::spawn(async move {
        tokio::select! {
            () = kill.cancelled() => {}
            () = ready.closed() => {}
            () = accept_all(&listener, &acceptor, &ready) => {}
        }
    });
    ReceiverStream::new(connections)
}

async fn accept_all(
    listener: &TcpListener,
    acceptor: &Arc<Acceptor>,
    ready: &mpsc::Sender<io::Result<Connection>>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, from)) => {
                let (acceptor, ready) = (acceptor.clone(), ready.clone());
                tokio::spawn(async move {
                    let kill = acceptor.kill.clone();
                    let finished = kill
                        .run_until_cancelled(acceptor.finish(stream, from, place))
                        .await;
                    if let Some(Some(connection)) = finished {
                        // No receiver: the server is ending.
                        let _ = ready.send(Ok(connection)).await;
                    }
                });
            }
            Err(error) => {
                warn!(%error, "accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Acceptor {
    /// Runs the handshake. What fails here is the other end's matter, seen there as a TLS alert.
    async fn finish(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        place: OwnedSemaphorePermit,
    ) -> Option<Connection> {
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%from, %error, "connection lost");
            return None;
        }
        let stream = match timeout(HANDSHAKE_DEADLINE, self.tls.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                debug!(%from, %error, "TLS handshake failed");
                return None;
            }
            Err(_) => {
                debug!(%from, "TLS handshake took too long");
                return None;
            }
        };
        let peer = match tls::peer_identity(stream.get_ref().1) {
            Some(Ok(peer)) => Some(peer),
            None => None,
            Some(Err(error)) => {
                debug!(%from, %error, "certificate refused");
                return None;
            }
        };
        let kill = self.kill.clone().cancelled_owned();
        let (stranger_place, end): (_, Pin<Box<dyn Future<Output = ()> + Send>>) = if peer.is_some()
        {
            (None, Box::pin(kill))
        } else {
            let Ok(place) = self.strangers.clone().try_acquire_owned() else {
                debug!(%from, "too many connections without certificate");
                return None;
            };
            let end = async move {
                // Whichever comes first.
                let _ = timeout(STRANGER_LIFETIME, kill).await;
            };
            (Some(place), Box::pin(end))
        };
        Some(Connection {
            stream: Box::new(stream),
            peer: ConnectedPeer(peer),
            end,
            _places: std::iter::once(place).chain(stranger_place).collect(),
        })
    }
}
