//! Three etcd processes, asked by the same gRPC library from the same process: the comparison of the same run.

use crate::{CALLERS_PER_CONNECTION, Latencies, gather};
use anyhow::{Context as _, Result, bail};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

const VALUE_BYTES: usize = 256;
const KEY_BYTES: usize = 32;
const START: Duration = Duration::from_secs(20);

/// `etcdserverpb.PutRequest`, its first two fields.
#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// What is of no interest in the answer is skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

pub(crate) struct Etcd {
    children: Vec<Child>,
    clients: Vec<String>,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for child in &mut self.children {
            if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                eprintln!("{error}");
            }
        }
    }
}

fn free_url() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("http://{}", listener.local_addr()?))
}

impl Etcd {
    pub(crate) async fn start(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root)?;
        let peers: Vec<String> = (0..3).map(|_| free_url()).collect::<Result<_>>()?;
        let clients: Vec<String> = (0..3).map(|_| free_url()).collect::<Result<_>>()?;
        let names = (1..).map(|number| format!("e{number}"));
        let cluster: Vec<_> = names
            .zip(&peers)
            .map(|(n, url)| format!("{n}={url}"))
            .collect();
        let mut children = Vec::new();
        for (number, (peer, client)) in (1..).zip(peers.iter().zip(&clients)) {
            let log = std::fs::File::create(root.join(format!("e{number}.log")))?;
            let child = Command::new("etcd")
                .args(["--name", &format!("e{number}"), "--data-dir"])
                .arg(root.join(format!("e{number}")))
                .args([
                    "--listen-peer-urls",
                    peer,
                    "--initial-advertise-peer-urls",
                    peer,
                ])
                .args([
                    "--listen-client-urls",
                    client,
                    "--advertise-client-urls",
                    client,
                ])
                .args(["--initial-cluster", &cluster.join(",")])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .context("starting etcd (apt-get install etcd-server)")?;
            children.push(child);
        }
        let etcd = Self { children, clients };
        let deadline = Instant::now() + START;
        while etcd.put_once().await.is_err() {
            if Instant::now() > deadline {
                bail!(
                    "etcd does not answer within {START:?}; see {}",
                    root.display()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(etcd)
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    async fn put_once(&self) -> Result<()> {
        let channel = Endpoint::from_shared(self.clients[0].clone())?
            .connect()
            .await?;
        put(&mut Grpc::new(channel), 0).await
    }

    pub(crate) async fn puts(&self, width: usize, span: Duration) -> Result<Latencies> {
        let mut channels: Vec<Channel> = Vec::new();
        for number in 0..width.div_ceil(CALLERS_PER_CONNECTION) {
            let url = self.clients[number % self.clients.len()].clone();
            channels.push(
                Endpoint::from_shared(url)?
                    .tcp_nodelay(true)
                    .connect()
                    .await?,
            );
        }
        let until = Instant::now() + span;
        gather((0..width).map(|caller| {
            let mut grpc = Grpc::new(channels[caller / CALLERS_PER_CONNECTION].clone());
            async move {
                let mut ms = Vec::new();
                let mut number = (caller as u64) << 32;
                while Instant::now() < until {
                    let began = Instant::now();
                    number += 1;
                    put(&mut grpc, number).await?;
                    ms.push(began.elapsed().as_secs_f64() * 1e3);
                }
                Ok(ms)
            }
        }))
        .await
    }
}

async fn put(grpc: &mut Grpc<Channel>, number: u64) -> Result<()> {
    let mut key = vec![0; KEY_BYTES];
    key[..8].copy_from_slice(&number.to_be_bytes());
    let request = PutRequest {
        key,
        value: vec![7; VALUE_BYTES],
    };
    grpc.ready().await?;
    let path = http::uri::PathAndQuery::from_static("/etcdserverpb.KV/Put");
    let codec = ProstCodec::<PutRequest, PutResponse>::default();
    grpc.unary(tonic::Request::new(request), path, codec)
        .await?;
    Ok(())
}
