//! How fast the 0-db is on this machine: `cargo run --release -p qsfs-zdb --example throughput [DIR] [MiB]`.
//!
//! SET and GET of 1 MiB values and of 4 KiB values through client, TLS and server on loopback, beside the engine alone and a plain file.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a measuring tool"
)]

use bytes::Bytes;
use futures::stream::{StreamExt, iter};
use qsfs_zdb::client::{ClientConfig, ClientTls, ZdbClient};
use qsfs_zdb::engine::{Engine, EngineOptions, Namespace, NamespaceOptions};
use qsfs_zdb::server::{ServerConfig, serve};
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

async fn measure<F: Future<Output = ()>>(
    what: &str,
    count: usize,
    bytes: usize,
    depth: usize,
    operation: impl Fn(usize) -> F,
) {
    let (began, cpu) = (Instant::now(), cpu_seconds());
    iter((0..count).map(operation))
        .buffer_unordered(depth)
        .count()
        .await;
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let megabytes = (count * bytes) as f64 / 1e6;
    println!(
        "{what:<28} {:>8.0} MB/s {:>9.0} op/s {:>6.2} CPU-s/GiB",
        megabytes / seconds,
        count as f64 / seconds,
        cpu / ((count * bytes) as f64 / f64::from(1 << 30)),
    );
}

fn tls() -> (Arc<rustls::ServerConfig>, ClientTls) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["agent.qsfs".to_owned()]).unwrap();
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

fn value(bytes: usize, seed: usize) -> Bytes {
    // Distinct, so that nothing is "unchanged"; incompressible is not needed, nothing here compresses.
    let mut value = vec![0; bytes];
    value[..8].copy_from_slice(&seed.to_le_bytes());
    Bytes::from(value)
}

async fn through(client: &ZdbClient, name: &str, large: usize, small: usize) {
    measure(
        &format!("{name} SET 1 MiB"),
        large,
        1 << 20,
        16,
        |number| async move {
            let key = format!("{name}-large-{number}");
            client
                .set(key.as_bytes(), value(1 << 20, number))
                .await
                .unwrap();
        },
    )
    .await;
    measure(
        &format!("{name} GET 1 MiB"),
        large,
        1 << 20,
        16,
        |number| async move {
            let key = format!("{name}-large-{number}");
            client.get(key.as_bytes()).await.unwrap().unwrap();
        },
    )
    .await;
    measure(
        &format!("{name} SET 4 KiB"),
        small,
        4096,
        64,
        |number| async move {
            let key = format!("{name}-small-{number}");
            client
                .set(key.as_bytes(), value(4096, number))
                .await
                .unwrap();
        },
    )
    .await;
    measure(
        &format!("{name} GET 4 KiB"),
        small,
        4096,
        64,
        |number| async move {
            let key = format!("{name}-small-{number}");
            client.get(key.as_bytes()).await.unwrap().unwrap();
        },
    )
    .await;
}

async fn engine_alone(namespace: &Namespace, large: usize) {
    measure(
        "engine SET 1 MiB",
        large,
        1 << 20,
        16,
        |number| async move {
            let key = format!("engine-{number}");
            namespace
                .set(key.as_bytes(), value(1 << 20, number))
                .await
                .unwrap();
        },
    )
    .await;
    measure(
        "engine GET 1 MiB",
        large,
        1 << 20,
        16,
        |number| async move {
            let key = format!("engine-{number}");
            namespace.get(key.as_bytes()).await.unwrap().unwrap();
        },
    )
    .await;
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let parent = arguments.next().map_or_else(std::env::temp_dir, Into::into);
    let megabytes: usize = arguments.next().map_or(512, |text| text.parse().unwrap());
    let dir = tempfile::tempdir_in(parent).unwrap();
    let file = std::fs::File::create(dir.path().join("plain")).unwrap();
    measure(
        "plain file write, 8 MiB sync",
        megabytes,
        1 << 20,
        1,
        |number| {
            let file = &file;
            async move {
                std::io::Write::write_all(&mut &*file, &value(1 << 20, number)).unwrap();
                if number % 8 == 7 {
                    file.sync_data().unwrap();
                }
            }
        },
    )
    .await;
    let engine = Arc::new(Engine::open(EngineOptions::default()).unwrap());
    let options = NamespaceOptions::new("bench", dir.path().join("ns"));
    let namespace = engine.add_namespace(options).unwrap();
    engine_alone(&namespace, megabytes).await;
    let (server_tls, client_tls) = tls();
    for (name, server_tls, client_tls) in [
        ("TCP", None, None),
        ("TLS", Some(server_tls), Some(client_tls)),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let config = ServerConfig {
            tls: server_tls,
            ..ServerConfig::default()
        };
        tokio::spawn(serve(listener, Arc::clone(&engine), config, stop.clone()));
        let client = ZdbClient::new(ClientConfig {
            tls: client_tls,
            ..ClientConfig::new(endpoint, "bench")
        });
        through(&client, name, megabytes, 20_000).await;
        stop.cancel();
    }
    engine.close();
}
