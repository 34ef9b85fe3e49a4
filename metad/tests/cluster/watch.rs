//! Watches and stale reads while nodes die.

use super::*;
use qsfs_proto::api::Freshness;
use qsfs_proto::client::{Timing, Watching};
use qsfs_proto::watch::{Change, WatchEvent, WatchRequest};

async fn set_rebuilds(client: &MetadClient, rebuilds_max: u32) {
    let changed = ClusterSettings {
        rebuilds_max,
        ..settings()
    };
    let mutation = Mutation::SetSettings(changed);
    client.mutate(mutation).await.unwrap();
}

async fn next(watch: &mut Watching) -> WatchEvent {
    let event = tokio::time::timeout(DEADLINE, watch.next()).await;
    event.expect("an event in time").expect("no end").unwrap()
}

/// The settings that a watch tells, with their indexes, until one with so many rebuilds.
async fn told_until(watch: &mut Watching, last: u32) -> Vec<(u64, u32)> {
    let mut told = Vec::new();
    loop {
        if let WatchEvent::Changes { index, changes } = next(watch).await {
            for change in changes {
                if let Change::Settings(settings) = change {
                    told.push((index, settings.rebuilds_max));
                    if settings.rebuilds_max == last {
                        return told;
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_survives_every_node_and_says_everything_once_in_order() {
    let mut cluster = start().await;
    let client = cluster.client.clone();
    client.members().await.unwrap();
    let mut watch = client.watch(WatchRequest::everything(None));
    let WatchEvent::Began(_) = next(&mut watch).await else {
        panic!("a watch begins");
    };
    let mut number = 100;
    let mut told = Vec::new();
    for node in 0..3 {
        // One of them serves the watch, one of them leads.
        for _ in 0..10 {
            number += 1;
            set_rebuilds(&client, number).await;
        }
        cluster.nodes[node].kill();
        for _ in 0..10 {
            number += 1;
            set_rebuilds(&client, number).await;
        }
        told.extend(told_until(&mut watch, number).await);
        cluster.nodes[node].restart();
        cluster
            .until("three again", |c| async move {
                let members = c.members().await.ok()?;
                let well = members.iter().filter(|m| m.healthy && m.voter).count() == 3;
                well.then_some(())
            })
            .await;
    }
    let numbers: Vec<_> = told.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, (101..=number).collect::<Vec<_>>());
    assert!(
        told.windows(2).all(|pair| pair[0].0 < pair[1].0),
        "{told:?}"
    );

    // From a point in the middle, at whichever node remembers it: the same again.
    let (middle, _) = told[told.len() - 5];
    let mut again = client.watch(WatchRequest::everything(Some(middle)));
    assert_eq!(told_until(&mut again, number).await, told[told.len() - 4..]);
}

/// The way back from "too old": a listing says from which index to watch on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_is_watched_on_from_its_index() {
    let cluster = start().await;
    set_rebuilds(&cluster.client, 77).await;
    let (client, observed) = cluster.client.observed();
    assert_eq!(client.settings().await.unwrap().rebuilds_max, 77);
    let listed = observed.freshness().unwrap();
    assert_eq!(listed.age_ms, Some(0), "linearizable");
    set_rebuilds(&cluster.client, 78).await;
    let mut watch = client.watch(WatchRequest::everything(Some(listed.applied)));
    assert_eq!(next(&mut watch).await, WatchEvent::Began(listed.applied));
    let told = told_until(&mut watch, 78).await;
    assert_eq!(told.len(), 1);
    assert!(told[0].0 > listed.applied);
}

async fn stale(client: &MetadClient) -> Option<Freshness> {
    let (client, observed) = client.stale().observed();
    client.settings().await.ok()?;
    observed.freshness()
}

/// A node alone cannot know what happened since, but knows how long it was not up to date.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_read_says_how_old_it_is_at_most() {
    let mut cluster = start().await;
    set_rebuilds(&cluster.client, 5).await;
    let leader = cluster.leader().await;
    let (follower, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let timing = Timing {
        read: Duration::from_secs(2),
        ..Timing::default()
    };
    let alone = MetadClient::with_timing(
        vec![cluster.nodes[follower].address.clone()],
        cluster.context.identity(),
        ClientId::from_bytes([5; 16]),
        timing,
    )
    .unwrap();
    let near = cluster
        .until("an age", |_| {
            let alone = alone.clone();
            async move { stale(&alone).await?.age_ms }
        })
        .await;
    assert!(near < 60_000, "it is up to date all the time: {near}");
    let before = Instant::now();
    cluster.nodes[leader].kill();
    cluster.nodes[other].kill();
    let cut = Instant::now();
    // Its age grows with the time since the others were cut off, and never beyond that since they were whole.
    let aged = loop {
        let aged = stale(&alone).await;
        let age_ms = aged.and_then(|fresh| fresh.age_ms).unwrap();
        let most = near + u64::try_from(before.elapsed().as_millis()).unwrap() + 5_000;
        assert!(age_ms <= most, "{age_ms} > {most}");
        if cut.elapsed() >= Duration::from_secs(3) {
            break aged.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // An upper bound: it cannot claim to have been up to date after the others were gone. What was under way at the
    // cut, an answer of a leader about to die, may end a little later.
    assert!(aged.age_ms.unwrap() >= 2_900, "{aged:?}");
    assert!(alone.settings().await.is_err(), "no quorum");

    // Started again alone it has never been up to date.
    cluster.nodes[follower].kill();
    cluster.nodes[follower].restart();
    let unknown = cluster
        .until("an answer", |_| {
            let alone = alone.clone();
            async move { stale(&alone).await }
        })
        .await;
    assert_eq!(unknown.age_ms, None);
}
