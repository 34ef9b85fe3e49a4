//! `qsfs zdb`: the 0-db by itself, for those who want no filesystem.

use crate::signals;
use crate::table::print;
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use qsfs_zdb::client::Password;
use qsfs_zdb::engine::{DEFAULT_NAMESPACE, Engine, EngineOptions, Mode, SyncPolicy};
use qsfs_zdb::server::{Admin, Listener, RunningMode, ServerConfig, apply_mode, serve_all};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener, UnixStream};

/// Tells a data directory from other directories.
const MARKER: &str = "qsfs-zdb";
const MARKER_TEXT: &str = "Data of `qsfs zdb serve`, layout 1.\n";
/// Where the namespaces are in it.
const NAMESPACES: &str = "namespaces";
/// As in the protocol.
const PASSWORD_BYTES_MAX: usize = 128;
/// What a datafile may grow to.
const DATAFILE_BYTES: std::ops::RangeInclusive<u64> = (512 << 10)..=(4 << 30);

/// Verbs of `qsfs zdb`.
#[derive(Debug, Subcommand)]
pub(crate) enum ZdbCommand {
    /// Serve a 0-db: the protocol of 0-db 2.0, for zdbfs, zstor and redis clients
    Serve(Box<ServeArguments>),
}

/// In which mode namespaces are.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ModeArgument {
    /// Clients choose the keys
    User,
    /// The server gives the keys: 8-byte numbers, counted up
    Seq,
    /// Each namespace as NSSET says; user until then
    Mixed,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ListenArgument {
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for ListenArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: is followed by the path of the socket".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None if text.contains(':') => Ok(Self::Tcp(text.to_owned())),
            None => Err(format!(
                "{text:?} is no address: write ADDRESS:PORT or unix:PATH"
            )),
        }
    }
}

impl std::fmt::Display for ListenArgument {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => formatter.write_str(address),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

/// Options of `qsfs zdb serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Data directory; made if it is not there
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where to listen; may be repeated
    #[arg(
        long,
        value_name = "ADDRESS:PORT|unix:PATH",
        default_value = "127.0.0.1:9900"
    )]
    listen: Vec<ListenArgument>,
    /// File with the admin's password; without it everybody may make and remove namespaces
    #[arg(long, value_name = "FILE")]
    admin_file: Option<PathBuf>,
    /// The default namespace is read-only for those who do not know the admin's password
    #[arg(long, requires = "admin_file")]
    protect: bool,
    /// Mode of namespaces
    #[arg(long, value_enum, default_value = "mixed")]
    mode: ModeArgument,
    /// When a write is durable: before it is answered, or at most so long after
    #[arg(long, value_name = "always|interval[=MS]", default_value = "always", value_parser = sync_policy)]
    sync: SyncPolicy,
    /// Versions before the current one that new namespaces keep for HISTORY; NSSET NAMESPACE history N changes it
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(..=65_535))]
    history: u32,
    /// A datafile is complete at this size: 512KiB to 4GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = datafile_size)]
    datasize: u64,
    /// Live bytes that the default namespace may hold [default: as before; unlimited when new]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    maxsize: Option<u64>,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// An admin may end the server with STOP
    #[arg(long)]
    allow_stop: bool,
    /// Certificate chain, PEM: serve TLS 1.3 instead of plain text
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// `4096`, `512KiB`, `256MiB`, `1GiB`, `2TiB`.
fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size: write 4096, 512KiB, 256MiB, 1GiB or 2TiB");
    let end = text
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// `interval` alone is once a second.
fn sync_policy(text: &str) -> Result<SyncPolicy, String> {
    const INTERVAL_MS: std::ops::RangeInclusive<u64> = 1..=60_000;
    let bad = || format!("{text:?} is no way to sync: write always, interval, or interval=MS");
    let ms = match text {
        "always" => return Ok(SyncPolicy::Always),
        "interval" => 1000,
        _ => {
            let ms = text.strip_prefix("interval=").ok_or_else(bad)?;
            ms.parse().map_err(|_| bad())?
        }
    };
    if !INTERVAL_MS.contains(&ms) {
        return Err("the interval is 1 to 60000 ms".to_owned());
    }
    Ok(SyncPolicy::Interval(Duration::from_millis(ms)))
}

fn datafile_size(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if DATAFILE_BYTES.contains(&bytes) {
        Ok(bytes)
    } else {
        Err("a datafile has 512KiB to 4GiB".to_owned())
    }
}

/// Runs one.
pub(crate) async fn run(command: ZdbCommand) -> anyhow::Result<()> {
    match command {
        ZdbCommand::Serve(arguments) => run_server(*arguments).await,
    }
}

async fn run_server(arguments: ServeArguments) -> anyhow::Result<()> {
    // From here on a signal ends it in order, also while the namespaces are being opened.
    let shutdown = signals::shutdown()?;
    let config = config(&arguments)?;
    allow_descriptors(u64::from(arguments.connections));
    prepare(&arguments.data)?;
    let engine = open(&arguments, config.mode).await?;
    let mut listeners = Vec::new();
    for place in &arguments.listen {
        let listener = bind(place)
            .await
            .with_context(|| format!("listening on {place}"))?;
        listeners.push((place, listener));
    }
    for (place, listener) in &listeners {
        let place = match listener {
            Listener::Tcp(listener) => listener.local_addr()?.to_string(),
            Listener::Unix(_) => place.to_string(),
        };
        tracing::info!(listen = place, data = %arguments.data.display(), "0-db serves");
        print(&format!("ready on {place}\n"))?;
    }
    let listeners = listeners.into_iter().map(|(_, listener)| listener);
    let served = serve_all(listeners.collect(), Arc::clone(&engine), config, shutdown).await;
    let closing = tokio::task::spawn_blocking(move || engine.close());
    closing.await.context("closing the namespaces")?;
    for place in &arguments.listen {
        if let ListenArgument::Unix(path) = place {
            // It is gone already if somebody removed it.
            let _ = fs::remove_file(path);
        }
    }
    tracing::info!("0-db ended");
    served.context("serving")
}

/// Raises the limit of open files where it is too low for so many connections; what cannot be raised is said.
fn allow_descriptors(connections: u64) {
    // Datafiles, and what the runtime needs.
    let wanted = connections + 4096;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard).is_err()
        || hard < wanted
    {
        tracing::warn!(
            limit = hard,
            wanted,
            "few open files are allowed: not all connections may be taken"
        );
    }
}

fn config(arguments: &ServeArguments) -> anyhow::Result<ServerConfig> {
    let admin = match &arguments.admin_file {
        Some(file) => Admin::Password(read_password(file)?),
        None => {
            tracing::warn!(
                "no --admin-file: everybody who can connect may make and remove namespaces"
            );
            Admin::Everyone
        }
    };
    let tls = match (&arguments.tls_cert, &arguments.tls_key) {
        (Some(cert), Some(key)) => Some(Arc::new(tls(cert, key)?)),
        _ => None,
    };
    Ok(ServerConfig {
        tls,
        admin,
        protect: arguments.protect,
        mode: match arguments.mode {
            ModeArgument::User => RunningMode::Only(Mode::User),
            ModeArgument::Seq => RunningMode::Only(Mode::Sequential),
            ModeArgument::Mixed => RunningMode::Mixed,
        },
        history_versions: arguments.history,
        allow_stop: arguments.allow_stop,
        connections_max: usize::from(arguments.connections),
        ..ServerConfig::default()
    })
}

fn read_password(file: &Path) -> anyhow::Result<Password> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("reading the admin's password from {}", file.display()))?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() || password.len() > PASSWORD_BYTES_MAX || password.contains('\n') {
        bail!(
            "{} must hold the admin's password alone, one line of 1 to {PASSWORD_BYTES_MAX} bytes",
            file.display()
        );
    }
    Ok(Password::new(password))
}

fn tls(cert: &Path, key: &Path) -> anyhow::Result<rustls::ServerConfig> {
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("reading the certificate chain {}", cert.display()))?;
    if chain.is_empty() {
        bail!("{} holds no certificate", cert.display());
    }
    let key_der = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("reading the private key {}", key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("choosing TLS 1.3")?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .with_context(|| {
            format!(
                "{} and {} are no certificate and key that belong together",
                cert.display(),
                key.display()
            )
        })
}

/// An empty directory becomes a data directory; one of something else is left alone.
fn prepare(data: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(data)
        .with_context(|| format!("making the data directory {}", data.display()))?;
    let marker = data.join(MARKER);
    match fs::read_to_string(&marker) {
        Ok(text) if text == MARKER_TEXT => return Ok(()),
        Ok(_) => bail!(
            "{} is of another version of qsfs: use that one, or another --data",
            data.display()
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("reading {}", marker.display()));
        }
    }
    let reading = || format!("reading the data directory {}", data.display());
    for entry in fs::read_dir(data).with_context(reading)? {
        let name = entry.with_context(reading)?.file_name();
        // What a filesystem makes by itself, and what a start that was interrupted here left.
        if name != "lost+found" && name != "qsfs-zdb.new" {
            bail!(
                "{} holds something else ({}): --data wants an empty directory, or one that `qsfs zdb serve` made",
                data.display(),
                name.display()
            );
        }
    }
    let fresh = data.join("qsfs-zdb.new");
    let write = || -> std::io::Result<()> {
        fs::write(&fresh, MARKER_TEXT)?;
        fs::File::open(&fresh)?.sync_all()?;
        fs::rename(&fresh, &marker)?;
        fs::File::open(data)?.sync_all()
    };
    write().with_context(|| format!("writing {}", marker.display()))
}

async fn open(arguments: &ServeArguments, mode: RunningMode) -> anyhow::Result<Arc<Engine>> {
    let options = EngineOptions {
        root: Some(arguments.data.join(NAMESPACES)),
        datafile_bytes: arguments.datasize,
        sync: arguments.sync,
        ..EngineOptions::default()
    };
    let (maxsize, history) = (arguments.maxsize, arguments.history);
    let opening = tokio::task::spawn_blocking(move || -> anyhow::Result<Engine> {
        let engine = Engine::open(options)?;
        apply_mode(&engine, mode)?;
        if let Some(default) = engine.namespace(DEFAULT_NAMESPACE) {
            let unused = default.is_unused();
            default.change_settings(|settings| {
                settings.maxsize_bytes = maxsize.unwrap_or(settings.maxsize_bytes);
                if unused {
                    settings.history_versions = history;
                }
            })?;
        }
        Ok(engine)
    });
    let engine = opening.await.context("opening the namespaces")?;
    Ok(Arc::new(engine.with_context(|| {
        format!("opening the data of {}", arguments.data.display())
    })?))
}

async fn bind(place: &ListenArgument) -> anyhow::Result<Listener> {
    let path = match place {
        ListenArgument::Tcp(address) => return Ok(TcpListener::bind(address).await?.into()),
        ListenArgument::Unix(path) => path,
    };
    match UnixListener::bind(path) {
        Ok(listener) => Ok(listener.into()),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            // A socket that nobody listens on is left of a server that was killed.
            match UnixStream::connect(path).await {
                Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => {
                    fs::remove_file(path)?;
                    Ok(UnixListener::bind(path)?.into())
                }
                _ => Err(error.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_not() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512KiB"), Ok(512 << 10));
        assert_eq!(size("2TiB"), Ok(2 << 40));
        for bad in ["", "KiB", "1 MiB", "-1", "1MB", "99999999999999TiB"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
        assert_eq!(sync_policy("always"), Ok(SyncPolicy::Always));
        assert_eq!(
            sync_policy("interval=50"),
            Ok(SyncPolicy::Interval(Duration::from_millis(50)))
        );
        for bad in ["", "never", "interval=", "interval=0", "interval=1s"] {
            assert!(sync_policy(bad).is_err(), "{bad:?}");
        }
        assert!(datafile_size("1KiB").is_err() && datafile_size("5GiB").is_err());
    }

    #[test]
    fn places_to_listen_are_told_apart() {
        assert_eq!(
            "unix:/run/zdb".parse(),
            Ok(ListenArgument::Unix("/run/zdb".into()))
        );
        assert_eq!(
            "[::1]:9900".parse(),
            Ok(ListenArgument::Tcp("[::1]:9900".to_owned()))
        );
        assert!("9900".parse::<ListenArgument>().is_err());
        assert!("unix:".parse::<ListenArgument>().is_err());
    }
}
