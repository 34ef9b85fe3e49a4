//! A process one version older or newer is answered; one further away is told what to upgrade first.

use super::fake::{Cluster, Node};
use crate::api::{MetadError, Role};
use crate::channel::connect;
use crate::server::CallError;
use crate::tls::grpc_client_config;
use crate::verb::Query;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::{PROTOCOL_KEY, PROTOCOL_VERSION, Wire, check_protocol, error_of, pb};
use std::time::Duration;
use tonic::Request;

#[tokio::test]
async fn neighbours_are_answered_and_others_are_told_what_to_upgrade() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let admin = cluster.ca.issue(Role::Admin, "root").unwrap();
    let config = grpc_client_config(&admin).unwrap();
    let channel = connect(&node.address, config, Duration::from_secs(10));
    let channel = channel.await.unwrap();
    let ask = async |version: Option<String>| {
        let mut request = Request::new(pb::AskRequest {
            stale: false,
            query: Query::Volumes.to_wire(),
        });
        if let Some(version) = version {
            let version = version.parse().unwrap();
            request.metadata_mut().insert(PROTOCOL_KEY, version);
        }
        Stub::new(channel.clone()).ask(request).await
    };
    for version in [PROTOCOL_VERSION - 1, PROTOCOL_VERSION, PROTOCOL_VERSION + 1] {
        let answered = ask(Some(version.to_string())).await;
        assert!(answered.is_ok(), "{version}: {answered:?}");
    }
    let newer = (PROTOCOL_VERSION + 2).to_string();
    for (version, says) in [
        (Some(newer), "upgrade the metad nodes first"),
        (Some("x".to_owned()), "no program of qsfs"),
        (None, "no program of qsfs"),
    ] {
        let status = ask(version).await.unwrap_err();
        let Some(CallError::Refused(MetadError::Invalid(text))) = error_of(&status) else {
            panic!("{status:?}");
        };
        assert!(text.contains(says), "{text}");
    }
    node.stop().await;
}

/// There is no version two before the first one yet: said of the largest distance there is the other way round.
#[test]
fn an_old_caller_is_to_be_upgraded_first() {
    assert!(
        check_protocol(Some("4294967295"))
            .unwrap_err()
            .contains("metad nodes first")
    );
    assert!(check_protocol(Some("-1")).is_err());
    assert!(check_protocol(Some("")).is_err());
}
