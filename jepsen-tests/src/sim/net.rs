//! Connections under turmoil, without TLS: who connects says in a first line who it is, and is believed. Identities, roles and their
//! tables are as in a real cluster; only their proof is missing.

use super::world::World;
use async_trait::async_trait;
use bytes::Bytes;
use qsfs_proto::dial::{ByteStream, Dial};
use qsfs_proto::identity::PeerIdentity;
use qsfs_proto::raft::RaftRpc;
use qsfs_proto::server::RaftTransport;
use qsfs_zstor::id::MetadId;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use turmoil::net::{TcpListener, TcpStream};

/// Where every node listens.
pub const PORT: u16 = 7400;
/// Longest first line.
const NAME_BYTES_MAX: usize = 512;

/// Connects as somebody.
pub struct SimDial {
    /// Who.
    pub me: PeerIdentity,
}

#[async_trait]
impl Dial for SimDial {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn ByteStream>> {
        let mut stream = TcpStream::connect(address).await?;
        let text = serde_json::to_vec(&(self.me.cluster, self.me.role, &self.me.subject))?;
        let length = u16::try_from(text.len()).map_err(io::Error::other)?;
        stream.write_all(&length.to_le_bytes()).await?;
        stream.write_all(&text).await?;
        Ok(Box::new(stream))
    }
}

async fn greeted(mut stream: TcpStream) -> io::Result<(Box<dyn ByteStream>, Option<PeerIdentity>)> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let length = usize::from(u16::from_le_bytes(length));
    if length > NAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text).await?;
    let (cluster, role, subject): (_, _, String) = serde_json::from_slice(&text)?;
    let peer = PeerIdentity::new(cluster, role, subject).map_err(io::Error::other)?;
    Ok((Box::new(stream), Some(peer)))
}

/// Connections that said who they are, as they come.
pub fn accept(
    listener: TcpListener,
) -> mpsc::Receiver<(Box<dyn ByteStream>, Option<PeerIdentity>)> {
    let (ready, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let ready = ready.clone();
            tokio::spawn(async move {
                if let Ok(Ok(connection)) =
                    tokio::time::timeout(Duration::from_secs(5), greeted(stream)).await
                {
                    // The node is ending.
                    drop(ready.send(connection).await);
                }
            });
        }
    });
    connections
}

/// Raft messages of a node, some of them lost, late or twice.
pub struct Unreliable {
    /// Draws what happens.
    pub world: Arc<World>,
    /// Whose.
    pub node: usize,
    /// What answers.
    pub inner: Arc<dyn RaftTransport>,
}

#[async_trait]
impl RaftTransport for Unreliable {
    async fn handle(&self, from: MetadId, rpc: RaftRpc, payload: Bytes) -> Result<Bytes, String> {
        let payload = super::broken::inbound(&self.world, self.node, rpc, payload);
        let fate = self.world.draw_fate();
        if fate.lost {
            // The caller's deadline ends it.
            std::future::pending::<()>().await;
        }
        if let Some(later) = fate.again_after {
            let (inner, copy) = (Arc::clone(&self.inner), payload.clone());
            tokio::spawn(async move {
                tokio::time::sleep(later).await;
                drop(inner.handle(from, rpc, copy).await);
            });
        }
        let answer = self.inner.handle(from, rpc, payload).await;
        if fate.answer_lost {
            std::future::pending::<()>().await;
        }
        answer
    }
}
