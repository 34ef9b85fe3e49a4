//! Commands about the server itself.

use super::manage::megabytes;
use super::reply::Reply;
use super::session::Session;
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn time() -> Reply {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Reply::Array(vec![
        Reply::bulk(now.as_secs().to_string()),
        Reply::bulk(now.subsec_micros().to_string()),
    ])
}

/// The fields of 0-db, in its order. The index is in memory and in the datafiles: it has no disk traffic of its own.
pub(super) fn info(session: &Session) -> Reply {
    let server = &session.server;
    let counters = &server.counters;
    let uptime = server.started.elapsed().as_secs();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut text = String::new();
    let _ = write!(
        text,
        "# server\nserver_name: 0-db (qsfs-zdb)\nserver_revision: {version}\nengine_revision: {version}\n\
         instance_id: {pid}\nboot_time: {boot}\nuptime: {uptime}\n\n\
         # clients\nclients_lifetime: {clients}\n\n\
         # internals\nsequential_key_size: 8\n\n\
         # stats\ncommands_executed: {executed}\ncommands_failed: {failed}\ncommands_unauthorized: {unauthorized}\n\
         index_disk_read_failed: 0\nindex_disk_write_failed: 0\n\
         data_disk_read_failed: {read_failed}\ndata_disk_write_failed: {write_failed}\n",
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        boot = now.as_secs().saturating_sub(uptime),
        clients = counters.clients.get(),
        executed = counters.executed.get(),
        failed = counters.failed.get(),
        unauthorized = counters.unauthorized.get(),
        read_failed = counters.read_failed.get(),
        write_failed = counters.write_failed.get(),
    );
    for (name, bytes) in [
        ("index_disk_read", 0),
        ("index_disk_write", 0),
        ("data_disk_read", counters.read_bytes.get()),
        ("data_disk_write", counters.written_bytes.get()),
        ("network_rx", counters.received_bytes.get()),
        ("network_tx", counters.sent_bytes.get()),
    ] {
        let _ = writeln!(
            text,
            "{name}_bytes: {bytes}\n{name}_mb: {}",
            megabytes(bytes)
        );
    }
    Reply::bulk(text)
}

/// Ends the server, if it was started to allow that, in order.
pub(super) fn stop(session: &Session) -> Result<Reply, Reply> {
    if !session.server.config.allow_stop {
        return Err(Reply::error("Unauthorized"));
    }
    session.require_admin()?;
    tracing::info!(client = session.client, "asked to stop");
    session.server.shutdown.cancel();
    Ok(Reply::simple("Stopping"))
}

/// The hooks that ran lately: this server runs none.
pub(super) fn hooks(session: &Session) -> Result<Reply, Reply> {
    session.require_admin()?;
    Ok(Reply::Array(Vec::new()))
}

pub(super) fn mirror(session: &Session) -> Result<Reply, Reply> {
    session.require_admin()?;
    Err(Reply::error("Mirroring is not supported"))
}
