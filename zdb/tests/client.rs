//! The client against our server over TCP, unix socket and TLS, against servers that misbehave, and against a foreign 0-db
//! (`QSFS_TEST_ZDB=host:port`) when there is one.
#![expect(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use qsfs_zdb::client::{ClientConfig, ClientError, ClientTls, Password, ZdbClient};
use qsfs_zdb::engine::{Engine, EngineOptions, NamespaceOptions, NamespaceSettings};
use qsfs_zdb::server::{Admin, Listener, ServerConfig, serve};
use rcgen::{CertificateParams, KeyPair};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "backend-1";
const SECRET: &str = "correct horse";

/// An engine with one protected namespace in a directory of its own, as an agent has it.
fn engine(dir: &TempDir) -> Arc<Engine> {
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let options = NamespaceOptions {
        settings: NamespaceSettings {
            password: Some(SECRET.to_owned()),
            public: false,
            maxsize_bytes: 40 << 20,
            ..NamespaceSettings::default()
        },
        ..NamespaceOptions::new(NAMESPACE, dir.path().join("ns"))
    };
    engine.add_namespace(options).unwrap();
    Arc::new(engine)
}

fn protected(endpoint: String) -> ClientConfig {
    ClientConfig {
        password: Some(Password::new(SECRET)),
        ..ClientConfig::new(endpoint, NAMESPACE)
    }
}

fn agent_server(tls: Option<Arc<rustls::ServerConfig>>) -> ServerConfig {
    ServerConfig {
        tls,
        admin: Admin::Nobody,
        ..ServerConfig::default()
    }
}

fn begin(
    listener: impl Into<Listener>,
    engine: &Arc<Engine>,
    config: ServerConfig,
) -> CancellationToken {
    let stop = CancellationToken::new();
    tokio::spawn(serve(
        listener.into(),
        Arc::clone(engine),
        config,
        stop.clone(),
    ));
    stop
}

/// What every 0-db must do for us.
async fn suite(client: &ZdbClient) {
    client.ping().await.unwrap();
    assert_eq!(client.get(b"absent").await.unwrap(), None);
    assert!(!client.exists(b"absent").await.unwrap());
    assert!(!client.delete(b"absent").await.unwrap());
    assert_eq!(client.check(b"absent").await.unwrap(), None);
    let mut values = BTreeMap::new();
    for (number, bytes) in [1_usize, 100, 65_536, 1 << 20, 3 << 20]
        .into_iter()
        .enumerate()
    {
        let key = Bytes::from(format!("key-{number}\0\r\n\u{ff}"));
        let value: Vec<u8> = (0..bytes)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        values.insert(key, Bytes::from(value));
    }
    let setting = values
        .iter()
        .map(|(key, value)| client.set(key, value.clone()));
    for outcome in futures::future::join_all(setting).await {
        outcome.unwrap();
    }
    // Storing the same again is no error.
    let (first, value) = values.first_key_value().unwrap();
    client.set(first, value.clone()).await.unwrap();
    for (key, value) in &values {
        assert!(client.get(key).await.unwrap().as_ref() == Some(value));
        assert!(client.exists(key).await.unwrap());
        assert_eq!(client.check(key).await.unwrap(), Some(true));
    }
    let mut found = Vec::new();
    let mut cursor: Option<Bytes> = None;
    while let Some(page) = client.scan(cursor.as_deref()).await.unwrap() {
        found.extend(
            page.entries
                .into_iter()
                .map(|entry| (entry.key, entry.bytes)),
        );
        cursor = Some(page.cursor);
    }
    found.sort();
    let wanted = values
        .iter()
        .map(|(key, value)| (key.clone(), value.len() as u64));
    assert_eq!(found, wanted.collect::<Vec<_>>());
    let info = client.nsinfo().await.unwrap();
    assert_eq!(info.entries, values.len() as u64);
    assert_eq!(
        info.data_size_bytes,
        values.values().map(|value| value.len() as u64).sum::<u64>()
    );
    assert!(info.free_bytes() > 0 && !info.sequential);
    for key in values.keys() {
        assert!(client.delete(key).await.unwrap());
        assert_eq!(client.get(key).await.unwrap(), None);
    }
    assert!(client.scan(None).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_over_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let stop = begin(listener, &engine, agent_server(None));
    suite(&ZdbClient::new(protected(endpoint.clone()))).await;

    let wrong = ClientConfig {
        password: Some(Password::new("wrong")),
        ..protected(endpoint.clone())
    };
    let refused = ZdbClient::new(wrong).ping().await;
    assert!(matches!(refused, Err(ClientError::Refused { text, .. }) if text == "Access denied"));

    let other = ClientConfig::new(endpoint, "other");
    let refused = ZdbClient::new(other).ping().await;
    assert!(
        matches!(refused, Err(ClientError::Refused { text, .. }) if text == "Namespace not found")
    );
    stop.cancel();
    engine.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let path = dir.path().join("socket");
    let stop = begin(
        UnixListener::bind(&path).unwrap(),
        &engine,
        agent_server(None),
    );
    suite(&ZdbClient::new(protected(
        path.to_str().unwrap().to_owned(),
    )))
    .await;
    stop.cancel();
    engine.close();
}

/// A self-signed server and a client that trusts it alone.
fn tls() -> (Arc<rustls::ServerConfig>, ClientTls) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["agent.qsfs".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.into())
        .unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientTls {
        config: Arc::new(client),
        server_name: "agent.qsfs".to_owned(),
    };
    (Arc::new(server), client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_over_tls_and_refuses_without() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let (server_tls, client_tls) = tls();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let stop = begin(listener, &engine, agent_server(Some(server_tls)));
    let config = ClientConfig {
        tls: Some(client_tls),
        ..protected(endpoint.clone())
    };
    suite(&ZdbClient::new(config.clone())).await;

    let plain = ZdbClient::new(protected(endpoint)).ping().await;
    assert!(
        plain.is_err(),
        "plain text must not be served on a TLS port"
    );
    let (_, strangers) = tls();
    let stranger = ClientConfig {
        tls: Some(strangers),
        ..config
    };
    assert!(matches!(
        ZdbClient::new(stranger).ping().await,
        Err(ClientError::Unreachable { .. })
    ));
    stop.cancel();
    engine.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_namespace_is_full_and_a_corrupt_value_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let stop = begin(listener, &engine, agent_server(None));
    let client = ZdbClient::new(protected(endpoint));
    let megabytes = Bytes::from(vec![7; 8 << 20]);
    for number in 0..5_u8 {
        client.set(&[number], megabytes.clone()).await.unwrap();
    }
    assert!(matches!(
        client.set(b"more", Bytes::from_static(b"x")).await,
        Err(ClientError::Full { .. })
    ));
    let names = std::fs::read_dir(dir.path().join("ns")).unwrap();
    let datafile = names
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|end| end == "zdb"))
        .unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(datafile)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 100_000).unwrap();
    assert!(matches!(
        client.get(&[0]).await,
        Err(ClientError::Corrupt { .. })
    ));
    assert_eq!(client.check(&[0]).await.unwrap(), Some(false));
    assert!(client.get(&[1]).await.unwrap() == Some(megabytes));
    stop.cancel();
    engine.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = begin(listener, &engine, agent_server(None));
    let client = ZdbClient::new(protected(address.to_string()));
    client.set(b"k", Bytes::from_static(b"v")).await.unwrap();
    stop.cancel();
    let mut listener = TcpListener::bind(address).await;
    while listener.is_err() {
        tokio::task::yield_now().await;
        listener = TcpListener::bind(address).await;
    }
    let stop = begin(listener.unwrap(), &engine, agent_server(None));
    assert_eq!(client.get(b"k").await.unwrap().unwrap(), "v");
    stop.cancel();
    engine.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_answer_is_a_timeout_and_the_connection_is_dropped() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let config = ClientConfig {
        request_timeout: Duration::from_millis(100),
        connections: 1,
        ..ClientConfig::new(endpoint, "any")
    };
    // Answers SELECT, then nothing.
    let mute = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 1024];
        let _ = stream.read(&mut buffer).await.unwrap();
        stream.write_all(b"+OK\r\n").await.unwrap();
        // Until the client drops the connection.
        while stream.read(&mut buffer).await.unwrap_or(0) > 0 {}
    });
    let client = ZdbClient::new(config);
    let late = client.set(b"k", Bytes::from_static(b"v")).await;
    assert!(matches!(late, Err(ClientError::Timeout { .. })));
    tokio::time::timeout(Duration::from_secs(20), mute)
        .await
        .unwrap()
        .unwrap();
}

/// The budget of bytes is shared by everything under way: what does not fit waits, and not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_under_way_are_bounded_and_waiting_for_room_ends() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let stop = begin(listener, &engine, agent_server(None));
    let small = ClientConfig {
        inflight_bytes: 1 << 20,
        ..protected(endpoint)
    };
    let client = ZdbClient::new(small);
    // More than the budget, one by one larger than it, all together: they take turns.
    let setting = (0..8_u8).map(|number| {
        let client = client.clone();
        async move {
            let value = Bytes::from(vec![number; 2 << 20]);
            client.set(&[number], value).await
        }
    });
    for outcome in futures::future::join_all(setting).await {
        outcome.unwrap();
    }
    stop.cancel();
    engine.close();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    // Takes connections and never answers.
    let mute = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    let config = ClientConfig {
        inflight_bytes: 1024,
        connect_timeout: Duration::from_secs(600),
        request_timeout: Duration::from_millis(50),
        ..ClientConfig::new(endpoint, "any")
    };
    let client = ZdbClient::new(config);
    let first = client.clone();
    let holding = tokio::spawn(async move { first.get(b"k").await });
    // Whoever comes first has the room; the other is told that there is none.
    let second = client.get(b"k");
    let told = tokio::select! {
        told = second => told,
        told = holding => told.unwrap(),
    };
    assert!(
        matches!(&told, Err(ClientError::Unreachable { reason, .. }) if reason.contains("no room")),
        "{told:?}"
    );
    mute.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_listening_is_unreachable_and_garbage_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    drop(listener);
    let client = ZdbClient::new(ClientConfig::new(endpoint, "any"));
    assert!(matches!(
        client.get(b"k").await,
        Err(ClientError::Unreachable { .. })
    ));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let client = ZdbClient::new(ClientConfig::new(endpoint, "any"));
    assert!(client.get(b"k").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_with_a_foreign_zdb() {
    let Ok(endpoint) = std::env::var("QSFS_TEST_ZDB") else {
        eprintln!("skipped: QSFS_TEST_ZDB=host:port of a foreign 0-db is not set");
        return;
    };
    let admin = ZdbClient::new(ClientConfig::new(endpoint.clone(), "default"));
    let name = format!("qsfs-test-{}", std::process::id());
    let done = admin.command(&[b"NSNEW", name.as_bytes()]).await;
    done.unwrap();
    for (property, value) in [("password", SECRET), ("public", "0")] {
        let command: [&[u8]; 4] = [
            b"NSSET",
            name.as_bytes(),
            property.as_bytes(),
            value.as_bytes(),
        ];
        admin.command(&command).await.unwrap();
    }
    let config = ClientConfig {
        password: Some(Password::new(SECRET)),
        ..ClientConfig::new(endpoint, name.clone())
    };
    let client = ZdbClient::new(config);
    suite(&client).await;
    drop(client);
    let removed = admin.command(&[b"NSDEL", name.as_bytes()]).await;
    removed.unwrap();
}
