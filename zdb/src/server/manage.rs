//! Commands about namespaces.

use super::RunningMode;
use super::reply::{INTERNAL, Reply, engine_error};
use super::session::Session;
use super::values::WORM_DELETE;
use crate::engine::{
    DEFAULT_NAMESPACE, Engine, EngineError, HISTORY_VERSIONS_MAX, Mode, Namespace,
    NamespaceSettings,
};
use bytes::Bytes;
use std::fmt::Write;
use std::sync::Arc;

const NAME_BYTES_MAX: usize = 128;
/// The value of a property, and its name.
const VALUE_BYTES_MAX: usize = 63;
const PROPERTY_BYTES_MAX: usize = 256;

fn name_argument(request: &[Bytes]) -> Result<&Bytes, Reply> {
    let [_, name] = request else {
        return Err(Reply::error("Unexpected arguments"));
    };
    checked_name(name)
}

fn checked_name(name: &Bytes) -> Result<&Bytes, Reply> {
    match name.len() {
        0 => Err(Reply::error("Invalid argument")),
        1..=NAME_BYTES_MAX => Ok(name),
        _ => Err(Reply::error("Namespace too long")),
    }
}

fn find(session: &Session, name: &[u8]) -> Option<Arc<Namespace>> {
    // No namespace has a name that is not UTF-8.
    let name = std::str::from_utf8(name).ok()?;
    session.server.engine.namespace(name)
}

/// The namespace of a name that was given.
pub(super) fn named(session: &Session, name: &Bytes) -> Result<Arc<Namespace>, Reply> {
    find(session, checked_name(name)?).ok_or_else(|| Reply::error("Namespace not found"))
}

/// Run what touches the disk beside the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    session: &Session,
    work: impl FnOnce(&Engine) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, Reply> {
    let engine = Arc::clone(&session.server.engine);
    match tokio::task::spawn_blocking(move || work(&engine)).await {
        Ok(result) => result.map_err(|error| engine_error(&error)),
        Err(_) => Err(Reply::error("Unexpected Internal Error")),
    }
}

pub(super) async fn create(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    let not_allowed = || Reply::error("This name is not allowed");
    let name = std::str::from_utf8(name_argument(request)?).map_err(|_| not_allowed())?;
    if name == DEFAULT_NAMESPACE {
        return Err(not_allowed());
    }
    let name = name.to_owned();
    let mode = session.server.config.mode;
    let history = session.server.config.history_versions;
    let made = blocking(session, move |engine| {
        let namespace = engine.create_namespace(&name)?;
        if mode == RunningMode::Only(Mode::Sequential) || history > 0 {
            namespace.change_settings(|settings| {
                if mode == RunningMode::Only(Mode::Sequential) {
                    settings.mode = Mode::Sequential;
                }
                settings.history_versions = history;
            })?;
        }
        Ok(())
    });
    match made.await {
        Ok(()) => Ok(Reply::ok()),
        Err(reply) if reply == Reply::error(INTERNAL) => {
            Err(Reply::error("Could not create namespace"))
        }
        Err(reply) => Err(reply),
    }
}

pub(super) async fn remove(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    let name = name_argument(request)?;
    if name == DEFAULT_NAMESPACE {
        return Err(Reply::error("Cannot remove default namespace"));
    }
    let namespace = find(session, name);
    let namespace = namespace.ok_or_else(|| Reply::error("This namespace doesn't exists"))?;
    let own = session.namespace.as_ref();
    if own.is_some_and(|own| Arc::ptr_eq(own, &namespace)) {
        return Err(Reply::error(
            "Cannot remove namespace you're currently using.",
        ));
    }
    let name = namespace.name().to_owned();
    match blocking(session, move |engine| engine.remove_namespace(&name)).await {
        Ok(()) => Ok(Reply::ok()),
        Err(reply) if reply == Reply::error(INTERNAL) => {
            Err(Reply::error("Could not delete this namespace"))
        }
        Err(reply) => Err(reply),
    }
}

pub(super) fn list(session: &Session) -> Reply {
    let names = session.server.engine.namespace_names();
    Reply::Array(names.into_iter().map(Reply::bulk).collect())
}

fn switch(value: &str) -> bool {
    value.starts_with('1')
}

/// As C's `atoll`: leading digits count, what has none is 0.
fn leading_number(value: &str) -> u64 {
    let value = value.trim_start();
    let digits = value.strip_prefix('+').unwrap_or(value);
    let end = digits
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(digits.len());
    match digits[..end].parse() {
        Ok(number) => number,
        Err(_) if end == 0 => 0,
        // More digits than a number has room for.
        Err(_) => u64::MAX,
    }
}

type Change = Box<dyn FnOnce(&mut NamespaceSettings) + Send>;

pub(super) async fn change(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    let [_, name, property, value] = request else {
        return Err(Reply::error("Unexpected arguments"));
    };
    if name.is_empty() || property.is_empty() || value.is_empty() {
        return Err(Reply::error("Invalid argument"));
    }
    checked_name(name)?;
    if property.len() > PROPERTY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
        return Err(Reply::error("Argument too long"));
    }
    if name == DEFAULT_NAMESPACE && !matches!(&property[..], b"mode" | b"lock" | b"freeze") {
        return Err(Reply::error("Cannot update default namespace"));
    }
    let namespace = named(session, name)?;
    let text = std::str::from_utf8(value).map(str::to_owned);
    let value = text.map_err(|_| Reply::error("Invalid argument"))?;
    let change: Change = match &property[..] {
        b"maxsize" => Box::new(move |settings| settings.maxsize_bytes = leading_number(&value)),
        b"password" => {
            Box::new(move |settings| settings.password = (value != "*").then_some(value))
        }
        b"public" => Box::new(move |settings| settings.public = switch(&value)),
        b"worm" => Box::new(move |settings| settings.worm = switch(&value)),
        b"lock" => Box::new(move |settings| settings.locked = switch(&value)),
        b"freeze" => Box::new(move |settings| settings.frozen = switch(&value)),
        // Ours: how many versions before the current one HISTORY finds.
        b"history" => {
            let versions = u32::try_from(leading_number(&value)).unwrap_or(u32::MAX);
            let versions = versions.min(HISTORY_VERSIONS_MAX);
            Box::new(move |settings| settings.history_versions = versions)
        }
        b"mode" => change_mode(session, &namespace, &value)?,
        _ => return Err(Reply::error("Invalid property")),
    };
    blocking(session, move |_| namespace.change_settings(change)).await?;
    Ok(Reply::ok())
}

fn change_mode(session: &Session, namespace: &Namespace, value: &str) -> Result<Change, Reply> {
    if session.server.config.mode != RunningMode::Mixed {
        return Err(Reply::error(
            "This server instance is configured to use a single runtime mode",
        ));
    }
    if !namespace.is_unused() {
        return Err(engine_error(&EngineError::InUseMode));
    }
    let mode = match value {
        "user" => Mode::User,
        "seq" => Mode::Sequential,
        _ => return Err(Reply::error("Invalid property value (expected: user, seq)")),
    };
    Ok(Box::new(move |settings| settings.mode = mode))
}

pub(super) async fn flush(session: &Session) -> Result<Reply, Reply> {
    let namespace = session.current()?;
    let settings = namespace.settings();
    if settings.public || settings.password.is_none() {
        return Err(Reply::error("Flushing public namespace denied"));
    }
    session.writable()?;
    // What protects single keys protects all of them.
    if settings.locked {
        return Err(engine_error(&EngineError::Locked));
    }
    if settings.worm {
        return Err(Reply::error(WORM_DELETE));
    }
    let namespace = Arc::clone(namespace);
    blocking(session, move |_| namespace.flush()).await?;
    Ok(Reply::ok())
}

/// The datafile that is written to is complete, the next begins.
pub(super) async fn jump(session: &Session) -> Result<Reply, Reply> {
    session.require_admin()?;
    let namespace = Arc::clone(session.current()?);
    blocking(session, move |_| namespace.jump()).await?;
    Ok(Reply::ok())
}

/// The index is made again from the datafiles.
pub(super) async fn reload(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    let namespace = named(session, name_argument(request)?)?;
    blocking(session, move |_| namespace.reload()).await?;
    Ok(Reply::ok())
}

/// With two digits, as 0-db writes them.
pub(super) fn megabytes(bytes: u64) -> String {
    let hundredths = (u128::from(bytes) * 100 + (1 << 19)) >> 20;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn yes_no(on: bool) -> &'static str {
    if on { "yes" } else { "no" }
}

/// The fields of 0-db, in its order.
pub(super) fn nsinfo(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let namespace = named(session, name_argument(request)?)?;
    let settings = namespace.settings();
    let usage = namespace.usage().map_err(|error| engine_error(&error))?;
    let mode = match settings.mode {
        Mode::User => "userkey",
        Mode::Sequential => "sequential",
    };
    let password = session.password_of(namespace.name(), settings.password);
    let mut text = String::from("# namespace\n");
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}: {value}");
    };
    line("name", &namespace.name());
    line("entries", &usage.keys);
    line("public", &yes_no(settings.public));
    line("worm", &yes_no(settings.worm));
    line("locked", &yes_no(settings.locked || settings.frozen));
    line("password", &yes_no(password.is_some()));
    line("data_size_bytes", &usage.used_bytes);
    line("data_size_mb", &megabytes(usage.used_bytes));
    line("data_limits_bytes", &settings.maxsize_bytes);
    // The index has no file of its own.
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
        let free = usage.disk_free_bytes;
        line(&format!("{part}_disk_freespace_bytes"), &free);
        line(&format!("{part}_disk_freespace_mb"), &megabytes(free));
    }
    if session.admin {
        let dir = namespace.dir().display();
        let (file, offset) = namespace.active_datafile();
        line("data_path", &dir);
        line("data_active", &format!("{file:08x}.zdb"));
        line("index_path", &dir);
        // The index is made from the datafiles.
        line("index_active", &format!("{file:08x}.zdb"));
        line("data_current_id", &file);
        line("data_current_offset", &offset);
    }
    Ok(Reply::bulk(text))
}

#[cfg(test)]
mod tests {
    use super::{leading_number, megabytes};

    #[test]
    fn numbers_are_read_as_0_db_reads_them() {
        for (text, number) in [
            ("123", 123),
            ("+5", 5),
            (" 7", 7),
            ("abc", 0),
            ("1M", 1),
            ("-3", 0),
            ("99999999999999999999999", u64::MAX),
        ] {
            assert_eq!(leading_number(text), number, "{text}");
        }
    }

    #[test]
    fn megabytes_have_two_digits() {
        assert_eq!(megabytes(0), "0.00");
        assert_eq!(megabytes(1 << 20), "1.00");
        assert_eq!(megabytes((5 << 20) + (1 << 19)), "5.50");
        assert_eq!(megabytes((1 << 20) - 1), "1.00");
    }
}
