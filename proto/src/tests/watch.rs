//! What a watch promises across nodes: ascending, whole, nothing skipped, nothing twice, and an end that says why.

use super::fake::{Cluster, Node, admin, client_as, volume};
use crate::api::{MetadError, Role};
use crate::client::Watching;
use crate::watch::{Change, WatchEvent, WatchRequest};
use qsfs_zstor::id::{DatafileId, VolumeId};
use std::time::Duration;

fn removed(volume: VolumeId, datafile: u64) -> Change {
    Change::RecordRemoved {
        volume,
        datafile: DatafileId(datafile),
    }
}

fn at(index: u64, count: u64) -> WatchEvent {
    let changes = (0..count).map(|number| removed(volume(1).id, number));
    WatchEvent::Changes {
        index,
        changes: changes.collect(),
    }
}

fn tell(cluster: &Cluster, event: WatchEvent) {
    cluster
        .history
        .send_modify(|(_, events)| events.push(event));
}

async fn next(watch: &mut Watching) -> WatchEvent {
    let event = tokio::time::timeout(Duration::from_secs(30), watch.next()).await;
    event.expect("an event in time").expect("no end").unwrap()
}

async fn end(watch: &mut Watching) -> MetadError {
    loop {
        match watch.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return error,
            None => panic!("it ended without a word"),
        }
    }
}

#[tokio::test]
async fn it_goes_on_at_another_node_where_it_was() {
    let cluster = Cluster::new();
    let (first, second) = (
        Node::start(&cluster, 1).await,
        Node::start(&cluster, 2).await,
    );
    let mut watch = admin(&cluster, &[&first, &second]).watch(WatchRequest::everything(Some(0)));
    assert_eq!(next(&mut watch).await, WatchEvent::Began(0));
    tell(&cluster, at(3, 1));
    assert_eq!(next(&mut watch).await, at(3, 1));
    tell(&cluster, WatchEvent::Progress(7));
    assert_eq!(next(&mut watch).await, WatchEvent::Progress(7));
    let served = first.address.clone();
    first.stop().await;
    tell(&cluster, at(8, 2));
    assert_eq!(next(&mut watch).await, at(8, 2), "and no second Began");
    tell(&cluster, at(9, 1));
    assert_eq!(next(&mut watch).await, at(9, 1));
    let asked = cluster.watches.lock().unwrap().clone();
    assert_eq!(asked[0], (served, Some(0)));
    assert_eq!(asked.last(), Some(&(second.address.clone(), Some(7))));
    second.stop().await;
}

/// An index with more changes than fit into one message.
#[tokio::test]
async fn an_index_is_whole_however_many_messages_it_takes() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let mut watch = admin(&cluster, &[&node]).watch(WatchRequest::everything(Some(0)));
    let large = at(5, 5_000);
    tell(&cluster, large.clone());
    assert_eq!(next(&mut watch).await, WatchEvent::Began(0));
    assert_eq!(next(&mut watch).await, large);
    node.stop().await;
}

#[tokio::test]
async fn too_old_is_said_when_no_node_remembers() {
    let cluster = Cluster::new();
    let nodes = [
        Node::start(&cluster, 1).await,
        Node::start(&cluster, 2).await,
    ];
    cluster.history.send_replace((100, Vec::new()));
    let client = admin(&cluster, &[&nodes[0], &nodes[1]]);
    let mut watch = client.watch(WatchRequest::everything(Some(99)));
    assert_eq!(end(&mut watch).await, MetadError::TooOld { oldest: 100 });
    assert_eq!(watch.next().await, None);
    assert_eq!(cluster.watches.lock().unwrap().len(), 2, "both were asked");
    let mut watch = client.watch(WatchRequest::everything(Some(100)));
    assert_eq!(next(&mut watch).await, WatchEvent::Began(100));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn who_may_not_see_a_volume_sees_no_change_of_it() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let (own, foreign) = (volume(1).id, volume(2).id);
    let bound = cluster.ca.issue(Role::Client, &own.to_string()).unwrap();
    let bound = client_as(&bound, &[&node]);
    let mut watch = bound.watch(WatchRequest::volume_only(foreign, None));
    let refused = end(&mut watch).await;
    assert!(matches!(refused, MetadError::Denied(_)), "{refused:?}");
    let metad = cluster.ca.issue(Role::Metad, "7").unwrap();
    let mut watch = client_as(&metad, &[&node]).watch(WatchRequest::everything(None));
    let refused = end(&mut watch).await;
    assert!(matches!(refused, MetadError::Denied(_)), "{refused:?}");

    let mut watch = bound.watch(WatchRequest::everything(Some(0)));
    assert_eq!(next(&mut watch).await, WatchEvent::Began(0));
    // This service forgot to narrow; the shell does not.
    let mixed = vec![removed(foreign, 1), removed(own, 2)];
    tell(
        &cluster,
        WatchEvent::Changes {
            index: 1,
            changes: vec![removed(foreign, 0)],
        },
    );
    tell(
        &cluster,
        WatchEvent::Changes {
            index: 2,
            changes: mixed,
        },
    );
    let seen = next(&mut watch).await;
    let only = vec![removed(own, 2)];
    assert_eq!(
        seen,
        WatchEvent::Changes {
            index: 2,
            changes: only
        }
    );
    node.stop().await;
}

#[tokio::test]
async fn without_a_node_it_waits_and_goes_on_when_one_comes() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let client = admin(&cluster, &[&node]);
    let (address, identity) = (
        node.address.clone(),
        cluster.ca.issue(Role::Metad, "1").unwrap(),
    );
    node.stop().await;
    let mut watch = client.watch(WatchRequest::everything(Some(4)));
    let waited = tokio::time::timeout(Duration::from_millis(300), watch.next()).await;
    assert!(waited.is_err(), "{waited:?}");
    let node = Node::start_at(&cluster, &identity, &address).await;
    assert_eq!(next(&mut watch).await, WatchEvent::Began(4));
    node.stop().await;
}
