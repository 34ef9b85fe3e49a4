//! A connection to one metad node, and the stream of mutations that all callers of a client share on it.

use crate::channel::Versioned;
use crate::client::MUTATIONS_IN_FLIGHT_MAX;
use crate::line::{Line, Numbered};
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::pb::mutate_reply::Kind;
use crate::wire::{pb, status_with};
use bytes::Bytes;
use prost::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;
use tonic::{Code, Request, Status};

/// A connection that has proven to be a node of our cluster. Clones share it, and its stream of mutations.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) stub: Stub<Versioned>,
    /// `None`: a node of a version that has no such stream.
    line: Arc<OnceCell<Option<Line<pb::MutateCall, pb::MutateReply>>>>,
}

impl Numbered for pb::MutateReply {
    type Reply = Kind;

    fn open(self) -> (u64, Option<Kind>) {
        (self.call, self.kind)
    }
}

impl Open {
    pub(super) fn new(stub: Stub<Versioned>) -> Self {
        Self {
            stub,
            line: Arc::default(),
        }
    }

    /// Sends one encoded `MutateRequest` and waits for its reply. The caller sets the deadline; `limit` tells it to a node that is
    /// asked one by one.
    pub(super) async fn mutate(
        mut self,
        request: Bytes,
        limit: Duration,
    ) -> Result<pb::Applied, Status> {
        let mut stub = self.stub.clone();
        let line = self.line.get_or_try_init(|| {
            Line::open(MUTATIONS_IN_FLIGHT_MAX, async move |calls| {
                stub.mutations(calls).await
            })
        });
        let Some(line) = line.await? else {
            let request = pb::MutateRequest::decode(request)
                .map_err(|error| Status::internal(error.to_string()))?;
            let mut request = Request::new(request);
            request.set_timeout(limit);
            return Ok(self.stub.mutate(request).await?.into_inner());
        };
        match line.call(|call| pb::MutateCall { call, request }).await? {
            Kind::Applied(applied) => Ok(applied),
            Kind::Failure(failure) => Err(status_with(Code::Unknown, &failure)),
        }
    }
}
