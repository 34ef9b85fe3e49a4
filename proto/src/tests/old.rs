//! A node of a version that has no stream of mutations.

use super::fake::{TIMING, revoke};
use crate::api::Applied;
use crate::client::MetadClient;
use crate::dial::{ByteStream, Dial};
use crate::wire::{Wire, pb};
use async_trait::async_trait;
use futures::stream::BoxStream;
use qsfs_zstor::id::{ClientId, ClusterId};
use std::io;
use std::sync::Arc;
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

#[tokio::test]
async fn a_node_without_a_stream_of_mutations_is_asked_one_by_one() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tonic::transport::Server::builder()
        .add_service(pb::metad_server::MetadServer::new(Old))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = tokio::spawn(serving);
    let client = ClientId::random(&mut rand::rng());
    let client = MetadClient::over(vec![address], Arc::new(Plain), CLUSTER, client, TIMING);
    let client = client.unwrap();
    for _ in 0..2 {
        assert_eq!(client.mutate(revoke("a")).await, Ok(Applied::Version(7)));
    }
    serving.abort();
}
