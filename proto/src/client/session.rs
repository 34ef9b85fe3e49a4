//! An agent's session, seen from the agent.

use super::AgentSession;
use crate::api::{AgentOrder, AgentReport, MetadError};
use crate::channel::Versioned;
use crate::server::{CallError, SESSION_QUEUE_MAX};
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::{Wire, error_of, pb};
use futures::StreamExt;
use futures::stream;
use qsfs_zstor::id::AgentId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

pub(super) async fn open(
    mut stub: Stub<Versioned>,
    agent: AgentId,
) -> Result<AgentSession, Status> {
    let frame = |kind| pb::SessionFrame { kind: Some(kind) };
    let (reports, receiver) = mpsc::channel::<AgentReport>(SESSION_QUEUE_MAX);
    let first = frame(pb::session_frame::Kind::Open(agent.to_wire()));
    // Whoever sends reports learns by its sender that the session is over.
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    let rest = ReceiverStream::new(receiver)
        .map(move |report| frame(pb::session_frame::Kind::Report(report.to_wire())))
        .take_until(ended.cancelled_owned());
    let frames = stream::once(std::future::ready(first)).chain(rest);
    let orders = stub.agent_session(frames).await?.into_inner();
    let (sender, receiver) = mpsc::channel(SESSION_QUEUE_MAX);
    tokio::spawn(async move {
        let _ended = guard;
        forward_orders(orders, sender).await;
    });
    Ok((reports, receiver))
}

/// Until either end is gone. An order that does not parse ends the session: what it wanted would be lost.
async fn forward_orders(
    mut orders: Streaming<pb::AgentOrder>,
    sender: mpsc::Sender<Result<AgentOrder, MetadError>>,
) {
    loop {
        let order = tokio::select! {
            order = orders.message() => order,
            () = sender.closed() => return,
        };
        let (order, last) = match order {
            Ok(None) => return,
            Ok(Some(order)) => match AgentOrder::from_wire(order) {
                Ok(order) => (Ok(order), false),
                Err(error) => {
                    let text = format!("an order does not parse: {error}");
                    (Err(MetadError::Unreachable(text)), true)
                }
            },
            Err(status) => match error_of(&status) {
                Some(CallError::NotLeader { .. }) => return,
                Some(CallError::Refused(error) | CallError::Decided(error)) => (Err(error), true),
                None => {
                    let text = format!("the session broke: {}", status.message());
                    (Err(MetadError::Unreachable(text)), true)
                }
            },
        };
        if sender.send(order).await.is_err() || last {
            return;
        }
    }
}
