//! The gRPC face: parse, ask the role table, call the service, answer.

use super::accept::ConnectedPeer;
use super::limits::{Account, ConnectionLimits, REPORT_BYTES_MAX};
use super::roles::{opens, permit_mutation, permit_query, permit_session, permit_watch};
use super::{CallError, Consistency, MetadService, RaftTransport, SESSION_QUEUE_MAX, watching};
use crate::api::{AgentReport, Freshness, MetadError, Mutation, Role};
use crate::client::{MUTATIONS_IN_FLIGHT_MAX, PAGE_MAX, RECORDS_MAX};
use crate::identity::PeerIdentity;
use crate::raft::RAFT_CALLS_IN_FLIGHT_MAX;
use crate::verb::{Answer, Query};
use crate::wire::{PROTOCOL_KEY, Wire, WireError, check_protocol, failure_of, pb, status_of};
use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message as _;
use qsfs_zstor::id::{AgentId, MetadId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, warn};

/// An agent names itself within so long after it opened a session.
const SESSION_OPEN_DEADLINE: Duration = Duration::from_secs(5);

pub(super) struct Grpc {
    pub(super) own: PeerIdentity,
    pub(super) service: Arc<dyn MetadService>,
    pub(super) raft: Arc<dyn RaftTransport>,
    /// Ends the streams that would outlive it.
    pub(super) shutdown: CancellationToken,
}

fn refuse(error: MetadError) -> Status {
    status_of(&error.into())
}

fn invalid(error: impl std::fmt::Display) -> Status {
    refuse(MetadError::Invalid(error.to_string()))
}

/// Runs before a request's body is read: the version must be ours or a neighbour's, and strangers only join.
pub(super) fn check_version(request: Request<()>) -> Result<Request<()>, Status> {
    let version = request.metadata().get(PROTOCOL_KEY);
    check_protocol(version.and_then(|version| version.to_str().ok())).map_err(invalid)?;
    Ok(request)
}

/// Members of the cluster only.
pub(super) fn check_member(request: Request<()>) -> Result<Request<()>, Status> {
    let request = check_version(request)?;
    caller(request.extensions())?;
    Ok(request)
}

/// metad nodes only.
pub(super) fn check_metad(request: Request<()>) -> Result<Request<()>, Status> {
    let request = check_version(request)?;
    let peer = caller(request.extensions())?;
    if peer.role == Role::Metad {
        Ok(request)
    } else {
        let text = format!("a certificate of role {} is no metad node's", peer.role);
        Err(refuse(MetadError::Denied(text)))
    }
}

fn caller(extensions: &tonic::Extensions) -> Result<PeerIdentity, Status> {
    match extensions.get::<ConnectedPeer>() {
        Some(ConnectedPeer {
            excess: Some(text), ..
        }) => Err(refuse(MetadError::Busy(text.clone()))),
        Some(ConnectedPeer {
            peer: Some(peer), ..
        }) => Ok(peer.clone()),
        Some(ConnectedPeer { peer: None, .. }) | None => Err(refuse(MetadError::Denied(
            "no client certificate was sent; join the cluster first".into(),
        ))),
    }
}

fn limits_of(extensions: &tonic::Extensions) -> Option<Arc<ConnectionLimits>> {
    extensions.get::<ConnectedPeer>()?.limits.clone()
}

/// A message of a stream: counted until it is dropped.
struct Message {
    account: Option<Arc<Account>>,
    bytes: usize,
}

impl Message {
    fn of(account: Option<Arc<Account>>, message: &impl prost::Message) -> Self {
        Self {
            account,
            bytes: message.encoded_len(),
        }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.release_message(self.bytes);
        }
    }
}

#[tonic::async_trait]
impl pb::join_server::Join for Grpc {
    async fn join(
        &self,
        request: Request<pb::JoinRequest>,
    ) -> Result<Response<pb::JoinGrant>, Status> {
        let request = Wire::from_wire(request.into_inner()).map_err(invalid)?;
        let grant = self
            .service
            .join(request)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(grant.to_wire()))
    }
}

fn peer_id(extensions: &tonic::Extensions) -> Result<MetadId, Status> {
    let peer = caller(extensions)?;
    peer.metad_id().ok_or_else(|| invalid("no metad id"))
}

/// Takes one message of a peer.
async fn hear(
    own: &PeerIdentity,
    raft: &dyn RaftTransport,
    from: MetadId,
    message: pb::RaftMessage,
) -> Result<pb::RaftReply, MetadError> {
    if own.metad_id() != Some(MetadId(message.target)) {
        let text = format!("this is {own}, not metad {}", message.target);
        return Err(MetadError::Invalid(text));
    }
    let rpc = Wire::from_wire(message.rpc)
        .map_err(|error: WireError| MetadError::Invalid(error.to_string()))?;
    let kind = match raft.handle(from, rpc, message.payload).await {
        Ok(payload) => pb::raft_reply::Kind::Payload(payload),
        Err(error) => pb::raft_reply::Kind::Error(error),
    };
    Ok(pb::RaftReply { kind: Some(kind) })
}

#[tonic::async_trait]
impl pb::raft_server::Raft for Grpc {
    type CallsStream = BoxStream<'static, Result<pb::RaftAnswer, Status>>;

    async fn call(
        &self,
        request: Request<pb::RaftMessage>,
    ) -> Result<Response<pb::RaftReply>, Status> {
        let from = peer_id(request.extensions())?;
        let reply = hear(&self.own, &*self.raft, from, request.into_inner()).await;
        Ok(Response::new(reply.map_err(refuse)?))
    }

    async fn calls(
        &self,
        request: Request<Streaming<pb::RaftCall>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        let from = peer_id(request.extensions())?;
        let (own, raft) = (Arc::new(self.own.clone()), self.raft.clone());
        let calls = request
            .into_inner()
            .take_until(self.shutdown.clone().cancelled_owned());
        let answers = calls.map(move |call| {
            let (own, raft) = (own.clone(), raft.clone());
            async move {
                let pb::RaftCall { call, message } = call?;
                let reply = hear(&own, &*raft, from, message.unwrap_or_default()).await;
                let reply = reply.unwrap_or_else(|error| pb::RaftReply {
                    kind: Some(pb::raft_reply::Kind::Error(error.to_string())),
                });
                Ok(pb::RaftAnswer {
                    call,
                    reply: Some(reply),
                })
            }
        });
        let answers = answers.buffer_unordered(RAFT_CALLS_IN_FLIGHT_MAX);
        Ok(Response::new(answers.boxed()))
    }
}

#[tonic::async_trait]
impl pb::metad_server::Metad for Grpc {
    type AgentSessionStream = BoxStream<'static, Result<pb::AgentOrder, Status>>;
    type MutationsStream = BoxStream<'static, Result<pb::MutateReply, Status>>;
    type WatchStream = BoxStream<'static, Result<pb::WatchEvent, Status>>;

    async fn hello(
        &self,
        request: Request<pb::HelloRequest>,
    ) -> Result<Response<pb::HelloReply>, Status> {
        if let Some(ConnectedPeer {
            peer: Some(peer),
            expires_ms: Some(expires_ms),
            ..
        }) = request.extensions().get()
        {
            self.service.heard_certificate(peer, *expires_ms);
        }
        Ok(Response::new(pb::HelloReply {
            cluster: self.own.cluster.to_wire(),
            metad: self.own.metad_id().map_or(0, |id| id.0),
        }))
    }

    async fn mutate(
        &self,
        request: Request<pb::MutateRequest>,
    ) -> Result<Response<pb::Applied>, Status> {
        let peer = caller(request.extensions())?;
        let applied = mutate(&*self.service, &peer, request.into_inner())
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(applied))
    }

    async fn mutations(
        &self,
        request: Request<Streaming<pb::MutateCall>>,
    ) -> Result<Response<Self::MutationsStream>, Status> {
        let peer = Arc::new(caller(request.extensions())?);
        let limits = limits_of(request.extensions());
        let place = limits.map(|limits| limits.mutation_stream()).transpose()?;
        let place = Arc::new(place);
        let account = request.extensions().get::<Arc<Account>>().cloned();
        let service = self.service.clone();
        let calls = request
            .into_inner()
            .take_until(self.shutdown.clone().cancelled_owned());
        let replies = calls.map(move |call| {
            let (peer, service) = (peer.clone(), service.clone());
            let (account, place) = (account.clone(), place.clone());
            async move {
                let _place = place;
                let call = call?;
                let _bytes = Message::of(account, &call);
                let pb::MutateCall { call, request } = call;
                let ended = match pb::MutateRequest::decode(request) {
                    Ok(request) => mutate(&*service, &peer, request).await,
                    Err(error) => Err(MetadError::Invalid(error.to_string()).into()),
                };
                let kind = match ended {
                    Ok(applied) => pb::mutate_reply::Kind::Applied(applied),
                    Err(error) => pb::mutate_reply::Kind::Failure(failure_of(&error)),
                };
                Ok(pb::MutateReply {
                    call,
                    kind: Some(kind),
                })
            }
        });
        let replies = replies.buffer_unordered(MUTATIONS_IN_FLIGHT_MAX);
        Ok(Response::new(replies.boxed()))
    }

    async fn ask(
        &self,
        request: Request<pb::AskRequest>,
    ) -> Result<Response<pb::AskReply>, Status> {
        let peer = caller(request.extensions())?;
        if let Some(account) = request.extensions().get::<Arc<Account>>() {
            account.turn_to_read().await;
        }
        let message = request.into_inner();
        let query: Query = Wire::from_wire(message.query).map_err(invalid)?;
        check_query_size(&query).map_err(invalid)?;
        permit_query(&peer, &query).map_err(refuse)?;
        // A node that has not heard that the caller is gone must not renew it.
        let consistency = if message.stale && !matches!(query, Query::RenewCertificate(_)) {
            Consistency::Stale
        } else {
            Consistency::Linearizable
        };
        let (fresh, answer) = self
            .answer(&peer, query, consistency)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(pb::AskReply {
            applied: fresh.applied,
            answer: answer.to_wire(),
            age_ms: fresh.age_ms,
        }))
    }

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let peer = caller(request.extensions())?;
        let request = Wire::from_wire(request.into_inner()).map_err(invalid)?;
        let request = permit_watch(&peer, request).map_err(refuse)?;
        let watch = self
            .service
            .watch(&peer, request)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(watching::stream(peer, watch)))
    }

    async fn agent_session(
        &self,
        request: Request<Streaming<pb::SessionFrame>>,
    ) -> Result<Response<Self::AgentSessionStream>, Status> {
        let peer = caller(request.extensions())?;
        permit_session(&peer).map_err(refuse)?;
        let limits = limits_of(request.extensions());
        let place = limits.map(|limits| limits.session()).transpose()?;
        let account = request.extensions().get::<Arc<Account>>().cloned();
        let mut frames = request.into_inner();
        let first = timeout(SESSION_OPEN_DEADLINE, frames.message())
            .await
            .map_err(|_| invalid("the session's first frame did not come"))??;
        let Some(pb::session_frame::Kind::Open(agent)) = first.and_then(|frame| frame.kind) else {
            return Err(invalid("a session begins with the agent's id"));
        };
        let (reports, receiver) = mpsc::channel(SESSION_QUEUE_MAX);
        // Fires when the answer stream is over, or never came to be: one half must not outlive the other.
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        tokio::spawn(ended.run_until_cancelled_owned(forward_reports(frames, reports, account)));
        let orders = self
            .service
            .agent_session(&peer, AgentId(agent), receiver)
            .await
            .map_err(|error| status_of(&error))?;
        let orders = ReceiverStream::new(orders).map(move |order| {
            let _held = (&guard, &place);
            Ok(order.to_wire())
        });
        Ok(Response::new(orders.boxed()))
    }
}

/// Ends when the agent is gone, says something that cannot be understood, or the service has dropped its end.
async fn forward_reports(
    mut frames: Streaming<pb::SessionFrame>,
    reports: mpsc::Sender<AgentReport>,
    account: Option<Arc<Account>>,
) {
    loop {
        let frame = tokio::select! {
            frame = frames.message() => frame,
            () = reports.closed() => return,
        };
        let report = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                debug!(%error, "agent session broke");
                return;
            }
        };
        let counted = Message::of(account.clone(), &report);
        if counted.bytes > REPORT_BYTES_MAX {
            let bytes = counted.bytes;
            warn!(
                bytes,
                "agent session ended: a report is longer than {REPORT_BYTES_MAX} bytes"
            );
            return;
        }
        let parsed = match report.kind {
            Some(pb::session_frame::Kind::Report(report)) => AgentReport::from_wire(report),
            Some(pb::session_frame::Kind::Open(_)) | None => Err(WireError::new("no report")),
        };
        match parsed {
            Ok(report) => {
                if reports.send(report).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                debug!(%error, "agent session ended: a report does not parse");
                return;
            }
        }
    }
}

async fn mutate(
    service: &dyn MetadService,
    peer: &PeerIdentity,
    message: pb::MutateRequest,
) -> Result<pb::Applied, CallError> {
    let invalid = |error: WireError| CallError::from(MetadError::Invalid(error.to_string()));
    let id = Wire::from_wire(message.id).map_err(invalid)?;
    let mutation: Mutation = Wire::from_wire(message.mutation).map_err(invalid)?;
    check_mutation_size(&mutation).map_err(invalid)?;
    permit_mutation(peer, &mutation)?;
    Ok(service.mutate(peer, id, mutation).await?.to_wire())
}

fn at_most(what: &str, count: usize) -> Result<(), WireError> {
    if count > RECORDS_MAX {
        let text = format!("{count} {what} in one request, at most {RECORDS_MAX}");
        return Err(WireError::new(text));
    }
    Ok(())
}

fn check_mutation_size(mutation: &Mutation) -> Result<(), WireError> {
    match mutation {
        Mutation::CommitDatafiles { records, .. } => at_most("records", records.len()),
        Mutation::ReleaseDatafiles { datafiles, .. } => at_most("datafiles", datafiles.len()),
        Mutation::ReportShards { reports } => at_most("reports", reports.len()),
        _ => Ok(()),
    }
}

fn check_query_size(query: &Query) -> Result<(), WireError> {
    match query {
        Query::Records { datafiles, .. } => at_most("datafiles", datafiles.len()),
        Query::ListRecords { limit, .. } | Query::BackendShards { limit, .. }
            if *limit == 0 || *limit > PAGE_MAX =>
        {
            Err(WireError::new(format_args!(
                "limit must be 1 to {PAGE_MAX}"
            )))
        }
        _ => Ok(()),
    }
}

impl Grpc {
    async fn answer(
        &self,
        peer: &PeerIdentity,
        query: Query,
        consistency: Consistency,
    ) -> Result<(Freshness, Answer), CallError> {
        let service = &self.service;
        let fresh = service.barrier(consistency).await?;
        let answer = match query {
            Query::Volume(name) => {
                let volume = service.volume(peer, &name).await?;
                if !opens(peer, volume.id) {
                    let text = format!("the certificate does not open volume {name}");
                    return Err(MetadError::Denied(text).into());
                }
                Answer::Volume(Box::new(volume))
            }
            Query::VolumeById(id) => {
                Answer::Volume(Box::new(service.volume_by_id(peer, id).await?))
            }
            Query::Volumes => {
                let mut volumes = service.volumes(peer).await?;
                volumes.retain(|volume| opens(peer, volume.id));
                Answer::Volumes(volumes)
            }
            Query::Records { volume, datafiles } => {
                Answer::Records(service.records(peer, volume, &datafiles).await?)
            }
            Query::ListRecords {
                volume,
                stream,
                after,
                limit,
            } => {
                let records = service.list_records(peer, volume, stream, after, limit);
                Answer::Records(records.await?)
            }
            Query::Backends => Answer::Backends(service.backends(peer).await?),
            Query::BackendFacts => Answer::BackendFacts(service.backend_facts(peer).await?),
            Query::Agents => Answer::Agents(service.agents(peer).await?),
            Query::BackendShards {
                backend,
                after,
                limit,
            } => {
                let shards = service.backend_shards(peer, backend, after, limit);
                Answer::BackendShards(shards.await?)
            }
            Query::Placement {
                volume,
                shard_bytes,
            } => Answer::Placement(service.placement(peer, volume, shard_bytes).await?),
            Query::Status => Answer::Status(Box::new(service.status(peer).await?)),
            Query::Members => Answer::Members(service.members(peer).await?),
            Query::Settings => Answer::Settings(service.settings(peer).await?),
            Query::Tokens => Answer::Tokens(service.tokens(peer).await?),
            Query::IssueClientCertificate { csr_pem, volume } => {
                let pem = service.issue_client_certificate(peer, &csr_pem, volume);
                Answer::Certificate(pem.await?)
            }
            Query::RenewCertificate(csr_pem) => {
                Answer::Certificate(service.renew_certificate(peer, &csr_pem).await?)
            }
            Query::CertificateLife => {
                Answer::CertificateLife(service.certificate_life_ms(peer).await?)
            }
            Query::Scrub { backend } => {
                service.scrub(peer, backend).await?;
                Answer::Done
            }
            Query::RemoveMember(member) => {
                service.remove_member(peer, member).await?;
                Answer::Done
            }
            Query::TransferLeader(to) => {
                service.transfer_leader(peer, to).await?;
                Answer::Done
            }
        };
        Ok((fresh, answer))
    }
}
