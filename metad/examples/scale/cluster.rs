//! Three processes on the loaded records: restored from a backup, joined over the network, led by another.

use crate::load::VOLUME;
use crate::memory;
use anyhow::{Context as _, Result, bail};
use qsfs_metad::{
    BootstrapOptions, JoinOptions, RestoreOptions, ServeOptions, bootstrap, join, restore,
};
use qsfs_proto::api::ClusterSettings;
use qsfs_proto::client::MetadClient;
use qsfs_proto::context::Context;
use qsfs_zstor::id::{ClientId, DatafileId};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(300);
const HOUR_MS: u64 = 3_600_000;
const LOOKS: u64 = 100;
/// While a node catches up.
const LOOKS_AT_MOST: u64 = 1_000_000;

/// What a child process does.
pub(crate) fn serve(data: &Path) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let options = ServeOptions {
        data: data.to_owned(),
    };
    Ok(runtime.block_on(qsfs_metad::serve(options, CancellationToken::new()))?)
}

fn free_address() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

/// A cluster whose state is then loaded.
pub(crate) async fn born(data: &Path) -> Result<Context> {
    let born = bootstrap(BootstrapOptions {
        name: "m0".parse()?,
        location: "loc0".parse()?,
        listen: free_address()?,
        advertise: None,
        data: data.to_owned(),
        settings: ClusterSettings {
            suspect_after_ms: HOUR_MS,
            down_after_ms: HOUR_MS,
            lost_after_ms: HOUR_MS,
            ..ClusterSettings::default()
        },
        certificate_life: None,
        agent_tokens: 0,
    })
    .await?;
    Ok(born.context)
}

struct Node {
    data: PathBuf,
    address: String,
    child: Child,
}

impl Node {
    fn start(data: &Path, address: &str) -> Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg(data)
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Self {
            data: data.to_owned(),
            address: address.to_owned(),
            child,
        })
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error}");
        }
    }
}

/// Asks until the answer is yes; how long that took, in seconds.
async fn until<F: Future<Output = bool>>(what: &str, ask: impl Fn() -> F) -> Result<f64> {
    let began = Instant::now();
    while !ask().await {
        if began.elapsed() > DEADLINE {
            bail!("not within {DEADLINE:?}: {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(began.elapsed().as_secs_f64())
}

async fn healthy(client: &MetadClient, count: usize) -> bool {
    let members = client.members().await.unwrap_or_default();
    members.iter().filter(|m| m.voter && m.healthy).count() == count
}

async fn counted(client: &MetadClient) -> bool {
    let Ok(status) = client.status().await else {
        return false;
    };
    let counting = status.findings.iter().any(|f| f.name == "STILL_COUNTING");
    !counting && status.quorum.voters > 0 && !status.quorum.leader.is_empty()
}

pub(crate) async fn run(root: &Path, backup: &Path, context: &Context) -> Result<()> {
    let first = free_address()?;
    let began = Instant::now();
    let restored = restore(RestoreOptions {
        backup: backup.to_owned(),
        name: "m1".parse()?,
        location: "loc1".parse()?,
        listen: first.clone(),
        advertise: None,
        data: root.join("m1"),
    })
    .await?;
    println!(
        "restoring a backup takes {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let mut nodes = vec![Node::start(&root.join("m1"), &first)?];
    let context = Context::new(vec![first], context.identity().clone(), None);
    let mut client = context.client(ClientId::from_bytes([2; 16]))?;
    let up = until("the first metad", || healthy(&client, 1)).await?;
    let plans = until("plans", || counted(&client)).await?;
    println!(
        "it answers after {up:.1} s and has looked at all records {plans:.1} s later; resident now/peak {}",
        memory(nodes[0].child.id())
    );
    for (number, token) in (2..).zip(&restored.tokens) {
        let (name, address) = (format!("m{number}"), free_address()?);
        let data = root.join(&name);
        join(JoinOptions {
            token: token.to_string(),
            name: name.parse()?,
            location: format!("loc{number}").parse()?,
            listen: address.clone(),
            advertise: None,
            data: data.clone(),
        })
        .await?;
        nodes.push(Node::start(&data, &address)?);
        let done = CancellationToken::new();
        let looking = tokio::spawn(look(client.clone(), LOOKS_AT_MOST, done.clone()));
        let caught_up = until("a voter more", || healthy(&client, number)).await?;
        done.cancel();
        println!(
            "metad {number} joins empty and votes after {caught_up:.1} s; resident now/peak {}; a page of 1,000 records meanwhile: {}",
            memory(nodes[number - 1].child.id()),
            looking.await??
        );
    }
    let endpoints: Vec<_> = nodes.iter().map(|node| node.address.clone()).collect();
    let context = Context::new(endpoints, context.identity().clone(), None);
    client = context.client(ClientId::from_bytes([3; 16]))?;
    println!(
        "a page of 1,000 records over the network: {}",
        look(client.clone(), LOOKS, CancellationToken::new()).await?
    );
    let leader = client.members().await?.into_iter().find(|m| m.leader);
    let leader = leader.context("no leader")?.address;
    let dead = nodes.iter().position(|node| node.address == leader);
    let mut dead = nodes.swap_remove(dead.context("an unknown leader")?);
    let killed = Instant::now();
    dead.kill()?;
    until("another leader", || async {
        client.volumes().await.is_ok()
    })
    .await?;
    let reads = killed.elapsed().as_secs_f64();
    until("its plans", || counted(&client)).await?;
    println!(
        "after the leader was killed reads go on after {reads:.1} s; the new one has looked at all records {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    );
    let began = Instant::now();
    nodes.push(Node::start(&dead.data, &dead.address)?);
    until("three voters again", || healthy(&client, 3)).await?;
    println!(
        "the killed one votes again {:.1} s after its start",
        began.elapsed().as_secs_f64()
    );
    for node in &nodes {
        println!("resident now/peak {}", memory(node.child.id()));
    }
    Ok(())
}

/// Pages over the network, anywhere, until it is told to end or has seen enough; how long they took.
async fn look(client: MetadClient, looks: u64, done: CancellationToken) -> Result<String> {
    let mut times = Vec::new();
    let volume = client.volumes().await?.into_iter().find(|v| v.id == VOLUME);
    volume.context("the volume is gone")?;
    for look in 0..looks {
        let at = DatafileId(look * 0x9e37_79b9 % 1_000_000);
        let began = Instant::now();
        client.list_records(VOLUME, None, at, 1_000).await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        if done.is_cancelled() {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(format!(
        "p50 {:.1} ms, longest {:.1} ms of {}",
        times[times.len() / 2],
        times[times.len() - 1],
        times.len()
    ))
}
