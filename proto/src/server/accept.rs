//! From a listener to a stream of finished TLS connections.
//!
//! Handshakes run beside each other, each with a deadline, so that a slow client blocks nobody. Connections of strangers (no client
//! certificate) have few places and a short life; a connection of a member ends with the certificate it showed, so that who is not
//! renewed has no access left. All end when `kill` fires.

use super::Places;
use super::limits::ConnectionLimits;
use crate::api::Role;
use crate::dial::ByteStream;
use crate::identity::{PeerIdentity, wall_ms};
use crate::tls;
use futures::Stream;
use rustls::ServerConfig;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
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
/// After an accept that failed (no file descriptors): the listener would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end. In the extensions of every request.
#[derive(Debug, Clone)]
pub(super) struct ConnectedPeer {
    /// `None`: a stranger.
    pub(super) peer: Option<PeerIdentity>,
    /// When its certificate ends, ms since the epoch.
    pub(super) expires_ms: Option<u64>,
    /// What its calls share. `None`: a metad, or a simulation.
    pub(super) limits: Option<Arc<ConnectionLimits>>,
    /// It is one too many: every request is answered with this.
    pub(super) excess: Option<String>,
}

/// One served connection. Holds its places until it is dropped.
pub(super) struct Connection {
    stream: Box<dyn ByteStream>,
    peer: ConnectedPeer,
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
    _places: (Vec<OwnedSemaphorePermit>, Option<MemberPlaces>),
}

/// Of its identity, and among all members.
type MemberPlaces = (Option<PlaceOf>, Option<OwnedSemaphorePermit>);

/// A connection whose other end needs no handshake to be known.
pub(super) fn known(
    stream: Box<dyn ByteStream>,
    peer: Option<PeerIdentity>,
    kill: &CancellationToken,
) -> Connection {
    Connection {
        stream,
        peer: ConnectedPeer {
            peer,
            expires_ms: None,
            limits: None,
            excess: None,
        },
        end: Box::pin(kill.clone().cancelled_owned()),
        _places: (Vec::new(), None),
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
    places: Places,
    strangers: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    members: Arc<Semaphore>,
    /// Connections of each identity. Entries are removed with the last one.
    each: Arc<Mutex<HashMap<PeerIdentity, usize>>>,
    pending: Arc<AtomicUsize>,
    kill: CancellationToken,
}

/// One connection of an identity; counted until it is dropped.
struct PlaceOf {
    each: Arc<Mutex<HashMap<PeerIdentity, usize>>>,
    peer: PeerIdentity,
}

impl PlaceOf {
    fn take(
        each: &Arc<Mutex<HashMap<PeerIdentity, usize>>>,
        peer: &PeerIdentity,
        most: usize,
    ) -> Option<Self> {
        let mut counts = each.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Self {
            each: each.clone(),
            peer: peer.clone(),
        })
    }
}

impl Drop for PlaceOf {
    fn drop(&mut self) {
        let mut counts = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

/// Accepts until the stream is dropped or `kill` fires.
pub(super) fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    places: Places,
    kill: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(16);
    let acceptor = Arc::new(Acceptor {
        tls: TlsAcceptor::from(config),
        places,
        strangers: Arc::new(Semaphore::new(places.strangers)),
        handshakes: Arc::new(Semaphore::new(places.handshakes)),
        members: Arc::new(Semaphore::new(places.members)),
        each: Arc::default(),
        pending: Arc::default(),
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
    let places = Arc::new(Semaphore::new(acceptor.places.connections));
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Who has no place closes at once; a queue of strangers must not keep those waiting who come after it.
                let Ok(shaking) = acceptor.handshakes.clone().try_acquire_owned() else {
                    debug!(%from, "too many handshakes at once");
                    continue;
                };
                let (acceptor, ready) = (acceptor.clone(), ready.clone());
                tokio::spawn(async move {
                    let kill = acceptor.kill.clone();
                    let finished = kill
                        .run_until_cancelled(acceptor.finish(stream, from, (place, shaking)))
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
        (place, shaking): (OwnedSemaphorePermit, OwnedSemaphorePermit),
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
        drop(shaking);
        let expires_ms = tls::peer_expires_ms(stream.get_ref().1);
        let admitted = peer.as_ref().map(|peer| self.admit(peer));
        let (places, excess) = match admitted {
            Some(Ok(places)) => (Some(places), None),
            Some(Err(excess)) => (None, Some(excess)),
            None => (None, None),
        };
        let mut kept = vec![place];
        let lifetime = if places.is_some() {
            let left_ms = expires_ms.unwrap_or(0).saturating_sub(wall_ms());
            Duration::from_millis(left_ms)
        } else {
            let Ok(place) = self.strangers.clone().try_acquire_owned() else {
                debug!(%from, "too many connections without certificate or place");
                return None;
            };
            kept.push(place);
            STRANGER_LIFETIME
        };
        let is_metad = peer.as_ref().is_some_and(|peer| peer.role == Role::Metad);
        let limits = (!is_metad).then(|| Arc::new(ConnectionLimits::new(self.pending.clone())));
        let kill = self.kill.clone().cancelled_owned();
        let end = async move {
            // Whichever comes first.
            let _ = timeout(lifetime, kill).await;
        };
        Some(Connection {
            stream: Box::new(stream),
            peer: ConnectedPeer {
                peer,
                expires_ms,
                limits,
                excess,
            },
            end: Box::pin(end),
            _places: (kept, places),
        })
    }

    /// A place for a member, or what its requests are answered.
    fn admit(&self, peer: &PeerIdentity) -> Result<MemberPlaces, String> {
        if peer.role == Role::Metad {
            return Ok((None, None));
        }
        let Some(own) = PlaceOf::take(&self.each, peer, self.places.each) else {
            return Err(format!(
                "{} {} has {} connections to this metad already, and may have no more",
                peer.role, peer.subject, self.places.each
            ));
        };
        let Ok(place) = self.members.clone().try_acquire_owned() else {
            return Err(format!(
                "this metad serves {} connections of members already, and no more",
                self.places.members
            ));
        };
        Ok((Some(own), Some(place)))
    }
}
