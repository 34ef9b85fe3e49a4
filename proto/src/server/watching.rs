//! A watch on its way to the wire: what the caller may see, in messages of a bounded size.

use super::Watch;
use super::roles::sees;
use crate::identity::PeerIdentity;
use crate::watch::{Change, WatchEvent};
use crate::wire::{Wire, pb, status_of};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use pb::watch_event::Kind;
use std::future::ready;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Changes of one message: with the largest records some megabytes.
const PART_CHANGES_MAX: usize = 1_024;

/// The answer stream: events, then why it ended.
pub(super) fn stream(
    caller: PeerIdentity,
    watch: Watch,
) -> BoxStream<'static, Result<pb::WatchEvent, Status>> {
    let events = ReceiverStream::new(watch.events)
        .flat_map(move |event| stream::iter(parts(&caller, event)))
        .map(Ok);
    let ended = stream::once(watch.ended)
        .filter_map(|ended| ready(ended.ok().map(|error| Err(status_of(&error)))));
    events.chain(ended).boxed()
}

/// One event in as many messages as it needs; none if the caller may see nothing of it.
fn parts(caller: &PeerIdentity, event: WatchEvent) -> Vec<pb::WatchEvent> {
    let message = |kind| pb::WatchEvent { kind: Some(kind) };
    match event {
        WatchEvent::Began(index) => vec![message(Kind::Began(index))],
        WatchEvent::Progress(index) => vec![message(Kind::Progress(index))],
        WatchEvent::Changes { index, mut changes } => {
            changes.retain(|change| sees(caller, change));
            let count = changes.len().div_ceil(PART_CHANGES_MAX);
            let part = |(number, changes): (usize, &[Change])| {
                message(Kind::Changes(pb::WatchChanges {
                    index,
                    changes: changes.iter().map(Wire::to_wire).collect(),
                    more: number + 1 < count,
                }))
            };
            changes
                .chunks(PART_CHANGES_MAX)
                .enumerate()
                .map(part)
                .collect()
        }
    }
}
