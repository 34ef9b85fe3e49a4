//! `qsfs metad watch`: what changes, as it changes.

use crate::session::Session;
use crate::table::print;
use clap::Args;
use qsfs_proto::api::MetadError;
use qsfs_proto::client::Watching;
use qsfs_proto::watch::{Change, WatchEvent, WatchRequest};
use qsfs_zstor::id::VolumeName;
use serde_json::json;
use std::time::Duration;

/// Version of the JSON lines.
const SCHEMA_VERSION: u32 = 1;

/// Between two looks whether anything can come.
const TROUBLE_LOOK: Duration = Duration::from_secs(2);

/// `qsfs metad watch`.
#[derive(Debug, Args)]
pub(crate) struct WatchArguments {
    /// Begin after this log index [default: now]
    #[arg(long, value_name = "INDEX")]
    after: Option<u64>,
    /// Of volumes and their records only this one
    #[arg(long, value_name = "VOLUME")]
    volume: Option<VolumeName>,
    /// Leave encoding records out
    #[arg(long)]
    no_records: bool,
    /// End after so many indexes with changes [default: go on until interrupted]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// One JSON object a line, progress included
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(super) async fn run(session: &Session, arguments: &WatchArguments) -> anyhow::Result<()> {
    let volume = match &arguments.volume {
        Some(name) => Some(session.volume(name).await?.id),
        None => None,
    };
    // Whoever runs for long must find the other nodes when the one it began with is gone.
    session.members().await?;
    let request = WatchRequest {
        volume,
        records: !arguments.no_records,
        ..WatchRequest::everything(arguments.after)
    };
    let mut watch = session.client().watch(request);
    let mut left = arguments.count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = next(&mut watch).await else {
            anyhow::bail!("the watch ended");
        };
        let event = event?;
        left -= u64::from(matches!(event, WatchEvent::Changes { .. }));
        print(&render(&event, arguments.json))?;
    }
    Ok(())
}

/// The next event. While none can come, standard error says why, once for every reason.
async fn next(watch: &mut Watching) -> Option<Result<WatchEvent, MetadError>> {
    let mut told = None;
    loop {
        tokio::select! {
            event = watch.next() => return event,
            () = tokio::time::sleep(TROUBLE_LOOK) => {}
        }
        let trouble = watch.trouble();
        if trouble != told {
            if let Some(trouble) = &trouble {
                tracing::warn!(trouble, "no metad gives a watch; it is tried again");
            }
            told = trouble;
        }
    }
}

fn render(event: &WatchEvent, json: bool) -> String {
    if json {
        return json_line(event);
    }
    match event {
        WatchEvent::Began(index) => format!("{index} watching\n"),
        WatchEvent::Progress(_) => String::new(),
        WatchEvent::Changes { index, changes } => changes
            .iter()
            .map(|change| format!("{index} {}\n", line(change)))
            .collect(),
    }
}

fn json_line(event: &WatchEvent) -> String {
    let value = match event {
        WatchEvent::Began(index) => json!({ "event": "began", "index": index }),
        WatchEvent::Progress(index) => json!({ "event": "progress", "index": index }),
        WatchEvent::Changes { index, changes } => {
            let shown: Vec<_> = changes.iter().map(json_change).collect();
            json!({ "event": "changes", "index": index, "changes": shown })
        }
    };
    let mut value = value;
    value["schema_version"] = json!(SCHEMA_VERSION);
    format!("{value}\n")
}

/// Without what is secret: a backend's password.
fn json_change(change: &Change) -> serde_json::Value {
    match change {
        Change::Volume(volume) => json!({
            "volume": volume.name, "id": volume.id, "epoch": volume.epoch, "head": volume.head.datafile,
            "writer": volume.lease.as_ref().map(|lease| &lease.holder),
        }),
        Change::VolumeRemoved(id) => json!({ "volume_removed": id }),
        Change::Record(record) => json!({
            "record": record.datafile, "volume": record.volume, "version": record.version,
            "backends": record.shards.iter().map(|shard| shard.backend).collect::<Vec<_>>(),
        }),
        Change::RecordRemoved { volume, datafile } => {
            json!({ "record_removed": datafile, "volume": volume })
        }
        Change::Backend(backend) => json!({
            "backend": backend.id, "location": backend.location, "node": backend.node,
            "verdict": backend.verdict, "intent": backend.intent,
        }),
        Change::Settings(settings) => json!({ "settings": settings }),
    }
}

fn line(change: &Change) -> String {
    match change {
        Change::Volume(volume) => format!(
            "volume {}: epoch {}, head {}, writer {}",
            volume.name,
            volume.epoch,
            volume.head.datafile,
            volume.lease.as_ref().map_or("none", |lease| &lease.holder)
        ),
        Change::VolumeRemoved(id) => format!("volume {id}: deleted"),
        Change::Record(record) => format!(
            "datafile {} of {}: version {}, {} shards, {} bytes",
            record.datafile,
            record.volume,
            record.version,
            record.shards.len(),
            record.plain_bytes
        ),
        Change::RecordRemoved { volume, datafile } => {
            format!("datafile {datafile} of {volume}: released")
        }
        Change::Backend(backend) => format!(
            "backend {} on {}/{}: {:?}, {:?}",
            backend.id, backend.location, backend.node, backend.verdict, backend.intent
        )
        .to_lowercase(),
        Change::Settings(_) => "settings changed".into(),
    }
}
