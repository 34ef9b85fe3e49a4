//! Commands about namespaces and about the server.

use super::reply::{Reply, engine_error};
use super::session::Session;
use crate::engine::{DEFAULT_NAMESPACE, Engine, EngineError, Mode, Namespace, NamespaceSettings};
use bytes::Bytes;
use std::fmt::Write;
use std::sync::Arc;

const NAME_BYTES_MAX: usize = 128;
const VALUE_BYTES_MAX: usize = 63;

pub(super) async fn carry_out(
    session: &mut Session,
    command: &'static str,
    request: &[Bytes],
) -> Result<Reply, Reply> {
    match command {
        "NSNEW" => create(session, request).await,
        "NSDEL" => remove(session, request).await,
        "NSLIST" => Ok(list(session)),
        "NSINFO" => nsinfo(session, request),
        "NSSET" => change(session, request).await,
        "FLUSH" => flush(session).await,
        _ => Err(Reply::error("Command not supported")),
    }
}

fn require_admin(session: &Session) -> Result<(), Reply> {
    if session.admin {
        Ok(())
    } else {
        Err(Reply::error("Permission denied"))
    }
}

fn name_argument(request: &[Bytes]) -> Result<&str, Reply> {
    let [_, name] = request else {
        return Err(Reply::error("Unexpected arguments"));
    };
    checked_name(name)
}

fn checked_name(name: &Bytes) -> Result<&str, Reply> {
    if name.is_empty() {
        return Err(Reply::error("Invalid argument"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Reply::error("Namespace too long"));
    }
    std::str::from_utf8(name).map_err(|_| Reply::error("This name is not allowed"))
}

fn find(session: &Session, name: &str) -> Result<Arc<Namespace>, Reply> {
    let namespace = session.server.engine.namespace(name);
    namespace.ok_or_else(|| Reply::error("Namespace not found"))
}

/// Run what touches the disk beside the async threads.
async fn blocking<T: Send + 'static>(
    session: &Session,
    work: impl FnOnce(&Engine) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, Reply> {
    let engine = Arc::clone(&session.server.engine);
    match tokio::task::spawn_blocking(move || work(&engine)).await {
        Ok(result) => result.map_err(|error| engine_error(&error)),
        Err(_) => Err(Reply::error("Unexpected Internal Error")),
    }
}

async fn create(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    require_admin(session)?;
    let name = name_argument(request)?.to_owned();
    if name == DEFAULT_NAMESPACE {
        return Err(Reply::error("This name is not allowed"));
    }
    blocking(session, move |engine| {
        engine.create_namespace(&name).map(drop)
    })
    .await?;
    Ok(Reply::ok())
}

async fn remove(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    require_admin(session)?;
    let name = name_argument(request)?.to_owned();
    if name == DEFAULT_NAMESPACE {
        return Err(Reply::error("Cannot remove default namespace"));
    }
    if session.server.engine.namespace(&name).is_none() {
        return Err(Reply::error("This namespace doesn't exists"));
    }
    if session
        .namespace
        .as_ref()
        .is_some_and(|namespace| namespace.name() == name)
    {
        return Err(Reply::error(
            "Cannot remove namespace you're currently using.",
        ));
    }
    blocking(session, move |engine| engine.remove_namespace(&name)).await?;
    Ok(Reply::ok())
}

fn list(session: &Session) -> Reply {
    let names = session.server.engine.namespace_names();
    Reply::Array(names.into_iter().map(Reply::bulk).collect())
}

fn switch(value: &str) -> bool {
    value.starts_with('1')
}

/// As C's `atoll`: leading digits count, anything else is 0.
fn leading_number(value: &str) -> u64 {
    let value = value.trim_start();
    let end = value
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(value.len());
    value[..end].parse().unwrap_or(0)
}

async fn change(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    require_admin(session)?;
    let [_, name, property, value] = request else {
        return Err(Reply::error("Unexpected arguments"));
    };
    if value.len() > VALUE_BYTES_MAX || property.len() > VALUE_BYTES_MAX {
        return Err(Reply::error("Argument too long"));
    }
    if value.is_empty() || property.is_empty() {
        return Err(Reply::error("Invalid argument"));
    }
    let name = checked_name(name)?.to_owned();
    find(session, &name)?;
    let text = |bytes: &Bytes| std::str::from_utf8(bytes).map(str::to_owned);
    let (Ok(property), Ok(value)) = (text(property), text(value)) else {
        return Err(Reply::error("Invalid argument"));
    };
    let free = matches!(property.as_str(), "mode" | "lock" | "freeze");
    if name == DEFAULT_NAMESPACE && !free {
        return Err(Reply::error("Cannot update default namespace"));
    }
    let change: Box<dyn FnOnce(&mut NamespaceSettings) + Send> = match property.as_str() {
        "maxsize" => Box::new(move |settings| settings.maxsize_bytes = leading_number(&value)),
        "password" => Box::new(move |settings| settings.password = (value != "*").then_some(value)),
        "public" => Box::new(move |settings| settings.public = switch(&value)),
        "worm" => Box::new(move |settings| settings.worm = switch(&value)),
        "lock" => Box::new(move |settings| settings.locked = switch(&value)),
        "freeze" => Box::new(move |settings| settings.frozen = switch(&value)),
        "mode" => {
            let mode = match value.as_str() {
                "user" => Mode::User,
                "seq" => Mode::Sequential,
                _ => return Err(Reply::error("Invalid property value (expected: user, seq)")),
            };
            Box::new(move |settings| settings.mode = mode)
        }
        _ => return Err(Reply::error("Invalid property")),
    };
    blocking(session, move |engine| match engine.namespace(&name) {
        Some(namespace) => namespace.change_settings(change),
        None => Err(EngineError::UnknownNamespace(name)),
    })
    .await?;
    Ok(Reply::ok())
}

async fn flush(session: &Session) -> Result<Reply, Reply> {
    let namespace = session.current()?;
    let settings = namespace.settings();
    if settings.public || settings.password.is_none() {
        return Err(Reply::error("Flushing public namespace denied"));
    }
    if !session.writable {
        return Err(Reply::error("Namespace is in read-only mode"));
    }
    let namespace = Arc::clone(namespace);
    blocking(session, move |_| namespace.flush()).await?;
    Ok(Reply::ok())
}

fn yes_no(on: bool) -> &'static str {
    if on { "yes" } else { "no" }
}

fn nsinfo(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let namespace = find(session, name_argument(request)?)?;
    let settings = namespace.settings();
    let usage = namespace.usage().map_err(|error| engine_error(&error))?;
    let megabytes = |bytes: u64| format!("{}.{:02}", bytes >> 20, ((bytes & 0xf_ffff) * 100) >> 20);
    let mode = match settings.mode {
        Mode::User => "userkey",
        Mode::Sequential => "sequential",
    };
    let mut text = String::new();
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}: {value}");
    };
    line("name", &namespace.name());
    line("entries", &usage.keys);
    line("public", &yes_no(settings.public));
    line("worm", &yes_no(settings.worm));
    line("locked", &yes_no(settings.locked || settings.frozen));
    line("password", &yes_no(settings.password.is_some()));
    line("data_size_bytes", &usage.used_bytes);
    line("data_size_mb", &megabytes(usage.used_bytes));
    line("data_limits_bytes", &settings.maxsize_bytes);
    // The index lives in memory; what it would take on disk is nothing.
    line("index_size_bytes", &0);
    line("index_size_kb", &"0.00");
    line(
        "next_internal_id",
        &format!("0x{:08x}", usage.next_id.swap_bytes()),
    );
    line("mode", &mode);
    let damaged = namespace.damaged().len();
    for part in ["index", "data"] {
        let failed = part == "data" && namespace.is_alive().is_err();
        line(&format!("stats_{part}_io_errors"), &u8::from(failed));
        line(&format!("stats_{part}_io_error_last"), &0);
        line(
            &format!("stats_{part}_faults"),
            if part == "data" { &damaged } else { &0 },
        );
    }
    if settings.maxsize_bytes > 0 {
        let room = settings.maxsize_bytes.saturating_sub(usage.used_bytes);
        line("space_available", &room);
    }
    for part in ["index", "data"] {
        line(
            &format!("{part}_disk_freespace_bytes"),
            &usage.disk_free_bytes,
        );
        line(
            &format!("{part}_disk_freespace_mb"),
            &megabytes(usage.disk_free_bytes),
        );
    }
    if session.admin {
        line("data_path", &namespace.dir().display());
        line("index_path", &namespace.dir().display());
    }
    Ok(Reply::bulk(text))
}

pub(super) fn info(session: &Session) -> Reply {
    let server = &session.server;
    let mut text = String::new();
    let namespaces = server.engine.namespace_names().len();
    let _ = write!(
        text,
        "# server\nserver_name: 0-db (qsfs-zdb)\nserver_revision: {version}\nengine_revision: {version}\n\
         instance_id: {pid}\nuptime: {uptime}\n\n\
         # clients\nclients_lifetime: {client}\n\n\
         # internals\nsequential_key_size: 8\nnamespaces: {namespaces}\nmax_namespace_name_length: {NAME_BYTES_MAX}\n\n\
         # stats\ninflight_bytes_available: {budget}\n",
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        uptime = server.started.elapsed().as_secs(),
        client = session.client,
        budget = server.budget.available_permits() * super::BUDGET_UNIT,
    );
    Reply::bulk(text)
}
