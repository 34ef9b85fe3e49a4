#![expect(clippy::unwrap_used, reason = "tests")]

use super::super::findings;
use super::*;
use crate::backup::BackupState;
use qsfs_proto::status::ResilverStatus;
use qsfs_zstor::id::MetadId;

const DAY_MS: u64 = 86_400_000;
const NOW_MS: u64 = 1_000 * DAY_MS;

fn member(id: u64, location: &str) -> Member {
    Member {
        id: MetadId(id),
        name: format!("m{id}").parse().unwrap(),
        location: location.parse().unwrap(),
        address: format!("h{id}:1"),
        voter: true,
        healthy: true,
        leader: id == 1,
    }
}

fn well() -> NodeFacts {
    NodeFacts {
        program: "1.0.0".into(),
        feature_level: 1,
        started_ms: NOW_MS - 30 * DAY_MS,
        backup: BackupState {
            newest_ms: NOW_MS - 3_600_000,
            ..BackupState::default()
        },
        disk_free_bytes: 100 << 30,
        disk_bytes: 200 << 30,
        certificate_expires_ms: NOW_MS + 300 * DAY_MS,
        certificate_life_ms: 700 * DAY_MS,
    }
}

/// Names, subjects and severities of what is told when the second node is so.
fn told(change: impl FnOnce(&mut Member, &mut NodeFacts)) -> Vec<(String, String, StatusVerdict)> {
    let mut members = [member(1, "a"), member(2, "b"), member(3, "c")];
    let mut facts = [well(), well(), well()];
    change(&mut members[1], &mut facts[1]);
    let nodes = facts.map(Some);
    let picture = Picture {
        backends: &[],
        facts: &BTreeMap::new(),
        volumes: &[],
        members: &members,
        nodes: &nodes,
        certificates: &certificates::Certificates::default(),
        now_ms: NOW_MS,
        leads: true,
        bad_shards: 0,
        counting: false,
        resilver: &ResilverStatus::default(),
    };
    let found = findings::find(&picture).into_iter();
    found.map(|f| (f.name, f.subject, f.severity)).collect()
}

fn one(name: &str, subject: &str, severity: StatusVerdict) -> Vec<(String, String, StatusVerdict)> {
    vec![(name.into(), subject.into(), severity)]
}

#[test]
fn nothing_is_told_of_nodes_that_are_well() {
    assert!(told(|_, _| {}).is_empty());
    // Just started: its first backup is not late yet.
    let fresh = told(|_, facts| {
        facts.backup = BackupState::default();
        facts.started_ms = NOW_MS - 60_000;
    });
    assert!(fresh.is_empty(), "{fresh:?}");
    // A large disk with little left in percent, and a small one with little left in bytes, are well.
    assert!(told(|_, facts| facts.disk_bytes = 100 << 40).is_empty());
    let small = told(|_, facts| (facts.disk_bytes, facts.disk_free_bytes) = (8 << 30, 2 << 30));
    assert!(small.is_empty(), "{small:?}");
    let silent = told(|_, facts| (facts.disk_bytes, facts.disk_free_bytes) = (0, 0));
    assert!(silent.is_empty(), "{silent:?}");
}

#[test]
fn each_trouble_has_its_name() {
    use StatusVerdict::{Critical, Warning};
    let silent = told(|member, _| member.healthy = false);
    assert_eq!(silent, one("METAD_DOWN", "m2", Warning));
    let learner = told(|member, _| member.voter = false);
    assert_eq!(learner, one("METAD_RENEWING", "m2", Warning));
    let same = told(|member, _| member.location = "a".parse().unwrap());
    assert_eq!(same, one("METAD_MAJORITY", "a", Warning));
    let old = told(|_, facts| facts.backup.newest_ms = NOW_MS - DAY_MS);
    assert_eq!(old, one("BACKUP_OLD", "m2", Warning));
    let failing = told(|_, facts| facts.backup.problem = "no space".into());
    assert_eq!(failing, one("BACKUP_FAILING", "m2", Warning));
    let shrunk = told(|_, facts| facts.backup.shrunk = Some((1_000, 3)));
    assert_eq!(shrunk, one("BACKUP_SHRUNK", "m2", Warning));
    let full = told(|_, facts| facts.disk_free_bytes = 3 << 30);
    assert_eq!(full, one("METAD_DISK_FULL", "m2", Warning));
    let full = told(|_, facts| facts.disk_free_bytes = 1 << 20);
    assert_eq!(full, one("METAD_DISK_FULL", "m2", Critical));
    let soon = told(|_, facts| facts.certificate_expires_ms = NOW_MS + 20 * DAY_MS);
    assert_eq!(soon, one("CERTIFICATE_EXPIRES", "m2", Warning));
    let over = told(|_, facts| facts.certificate_expires_ms = NOW_MS - 1);
    assert_eq!(over, one("CERTIFICATE_EXPIRES", "m2", Critical));
    // Of a short life the same days are plenty.
    let short = told(|_, facts| {
        facts.certificate_expires_ms = NOW_MS + 20 * DAY_MS;
        facts.certificate_life_ms = 60 * DAY_MS;
    });
    assert!(short.is_empty(), "{short:?}");
    let newer = told(|_, facts| facts.program = "2.0.0".into());
    assert_eq!(newer, one("METAD_VERSIONS", "metad", Warning));
}
