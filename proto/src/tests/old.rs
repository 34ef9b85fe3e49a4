//! Nodes of a version that has no streams of calls.

use super::fake::{TIMING, revoke};
use crate::api::Applied;
use crate::client::MetadClient;
use crate::dial::{ByteStream, Dial};
use crate::raft::{RaftPeer, RaftRpc};
use crate::wire::{Wire, pb};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use qsfs_zstor::id::{ClientId, ClusterId, MetadId};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

const CLUSTER: ClusterId = ClusterId::from_bytes([4; 16]);

struct Plain;

#[async_trait]
impl Dial for Plain {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn ByteStream>> {
        Ok(Box::new(TcpStream::connect(address).await?))
    }
}

struct Old;

#[tonic::async_trait]
impl pb::metad_server::Metad for Old {
    type AgentSessionStream = BoxStream<'static, Result<pb::AgentOrder, Status>>;
    type MutationsStream = BoxStream<'static, Result<pb::MutateReply, Status>>;
    type WatchStream = BoxStream<'static, Result<pb::WatchEvent, Status>>;

    async fn hello(
        &self,
        _: Request<pb::HelloRequest>,
    ) -> Result<Response<pb::HelloReply>, Status> {
        Ok(Response::new(pb::HelloReply {
            cluster: CLUSTER.to_wire(),
            metad: 1,
        }))
    }

    async fn mutate(&self, _: Request<pb::MutateRequest>) -> Result<Response<pb::Applied>, Status> {
        Ok(Response::new(Applied::Version(7).to_wire()))
    }

    async fn mutations(
        &self,
        _: Request<Streaming<pb::MutateCall>>,
    ) -> Result<Response<Self::MutationsStream>, Status> {
        Err(Status::unimplemented("of an older version"))
    }

    async fn ask(&self, _: Request<pb::AskRequest>) -> Result<Response<pb::AskReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn agent_session(
        &self,
        _: Request<Streaming<pb::SessionFrame>>,
    ) -> Result<Response<Self::AgentSessionStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn watch(
        &self,
        _: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("of an older version"))
    }
}

#[tonic::async_trait]
impl pb::raft_server::Raft for Old {
    type CallsStream = BoxStream<'static, Result<pb::RaftAnswer, Status>>;

    async fn call(
        &self,
        request: Request<pb::RaftMessage>,
    ) -> Result<Response<pb::RaftReply>, Status> {
        let payload = request.into_inner().payload;
        Ok(Response::new(pb::RaftReply {
            kind: Some(pb::raft_reply::Kind::Payload(payload)),
        }))
    }

    async fn calls(
        &self,
        _: Request<Streaming<pb::RaftCall>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        Err(Status::unimplemented("of an older version"))
    }
}

async fn start() -> (
    String,
    tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tonic::transport::Server::builder()
        .add_service(pb::metad_server::MetadServer::new(Old))
        .add_service(pb::raft_server::RaftServer::new(Old))
        .serve_with_incoming(TcpListenerStream::new(listener));
    (address, tokio::spawn(serving))
}

#[tokio::test]
async fn a_peer_without_a_stream_of_calls_is_called_one_by_one() {
    let (address, serving) = start().await;
    let peer = RaftPeer::over(MetadId(1), &address, Arc::new(Plain));
    for payload in ["a", "b"].map(Bytes::from) {
        let echo = peer.call(RaftRpc::Append, payload.clone(), Duration::from_secs(10));
        assert_eq!(echo.await, Ok(payload));
    }
    serving.abort();
}

#[tokio::test]
async fn a_node_without_a_stream_of_mutations_is_asked_one_by_one() {
    let (address, serving) = start().await;
    let client = ClientId::random(&mut rand::rng());
    let client = MetadClient::over(vec![address], Arc::new(Plain), CLUSTER, client, TIMING);
    let client = client.unwrap();
    for _ in 0..2 {
        assert_eq!(client.mutate(revoke("a")).await, Ok(Applied::Version(7)));
    }
    serving.abort();
}
