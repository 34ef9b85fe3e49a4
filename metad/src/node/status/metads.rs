//! What is worth telling of the metadata nodes themselves. Every text ends with what to do next.

use super::certificates;
use super::findings::{Picture, finding};
use crate::backup;
use crate::node::facts::NodeFacts;
use qsfs_proto::api::Member;
use qsfs_proto::ca::LEAF_VALIDITY;
use qsfs_proto::status::{Finding, StatusVerdict};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A newest backup older than so many intervals is late.
const BACKUP_LATE_INTERVALS: u32 = 3;
/// Less free than this share of the disk, in percent, and less than [`DISK_LOW_BYTES`]: nearly full.
const DISK_LOW_PERCENT: u64 = 5;
/// See [`DISK_LOW_PERCENT`]: snapshots, a backup and the log need room beside each other.
const DISK_LOW_BYTES: u64 = 4 << 30;
/// Less free than this: the log may stop any minute.
const DISK_CRITICAL_BYTES: u64 = 256 << 20;

pub(super) fn find(picture: &Picture<'_>, found: &mut Vec<Finding>) {
    placing(picture.members, found);
    for (member, facts) in picture.members.iter().zip(picture.nodes) {
        if picture.leads {
            presence(member, found);
        }
        if let Some(facts) = facts {
            backups(member, facts, picture.now_ms, found);
            disk(member, facts, found);
            certificate(member, facts, picture.now_ms, found);
        }
    }
    versions(picture, found);
}

fn ms(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// With three voters or more, no location should hold a majority: its loss would stop the cluster.
fn placing(members: &[Member], found: &mut Vec<Finding>) {
    let mut voters: BTreeMap<&str, usize> = BTreeMap::new();
    for member in members.iter().filter(|member| member.voter) {
        *voters.entry(member.location.as_str()).or_default() += 1;
    }
    let all: usize = voters.values().sum();
    for (location, count) in voters {
        if all >= 3 && count * 2 > all {
            let text = format!(
                "{count} of {all} metad voters are at {location}: when it is lost, nothing can be committed; move one elsewhere (qsfs metad join there, qsfs metad remove here)"
            );
            found.push(finding(
                "METAD_MAJORITY",
                location,
                StatusVerdict::Warning,
                text,
            ));
        }
    }
}

fn presence(member: &Member, found: &mut Vec<Finding>) {
    let Member { name, location, .. } = member;
    if !member.healthy {
        let text = format!(
            "metad {name} at {location} does not answer; start it again (qsfs metad serve), or see in its log whether it is damaged and waits for its peers"
        );
        found.push(finding("METAD_DOWN", name, StatusVerdict::Warning, text));
    } else if !member.voter {
        let text = format!(
            "metad {name} at {location} does not vote yet: it is new, or was damaged and copies everything from its peers; it votes by itself when it has"
        );
        found.push(finding(
            "METAD_RENEWING",
            name,
            StatusVerdict::Warning,
            text,
        ));
    }
}

fn backups(member: &Member, facts: &NodeFacts, now_ms: u64, found: &mut Vec<Finding>) {
    let (name, state) = (&member.name, &facts.backup);
    if !state.problem.is_empty() {
        let text = format!(
            "metad {name} cannot write a backup of the metadata: {}; mend that, then qsfs metad backup",
            state.problem
        );
        found.push(finding(
            "BACKUP_FAILING",
            name,
            StatusVerdict::Warning,
            text,
        ));
    }
    if let Some((before, now)) = state.shrunk {
        let text = format!(
            "the newest backup of metad {name} holds {now} rows, the one before {before}: if nobody deleted so much, keep the older ones and find out why (qsfs metad verify FILE)"
        );
        found.push(finding("BACKUP_SHRUNK", name, StatusVerdict::Warning, text));
    }
    let since_ms = now_ms.saturating_sub(state.newest_ms.max(facts.started_ms));
    let late = backup::INTERVAL * BACKUP_LATE_INTERVALS;
    if facts.started_ms > 0 && since_ms > ms(late) {
        let text = format!(
            "metad {name} has written no backup of the metadata for {} h; see its log and its disk, then qsfs metad backup",
            since_ms / 3_600_000
        );
        found.push(finding("BACKUP_OLD", name, StatusVerdict::Warning, text));
    }
}

fn disk(member: &Member, facts: &NodeFacts, found: &mut Vec<Finding>) {
    let (free, all) = (facts.disk_free_bytes, facts.disk_bytes);
    let low = free < DISK_LOW_BYTES && free < all / 100 * DISK_LOW_PERCENT;
    let severity = match (all, low) {
        // It does not say.
        (0, _) | (_, false) if free >= DISK_CRITICAL_BYTES || all == 0 => return,
        _ if free < DISK_CRITICAL_BYTES => StatusVerdict::Critical,
        _ => StatusVerdict::Warning,
    };
    let text = format!(
        "the disk of metad {} has {} MiB left of {}: without room for its log it takes no part; make room, or move its data directory",
        member.name,
        free >> 20,
        all >> 20
    );
    found.push(finding("METAD_DISK_FULL", &member.name, severity, text));
}

fn certificate(member: &Member, facts: &NodeFacts, now_ms: u64, found: &mut Vec<Finding>) {
    let ends_ms = facts.certificate_expires_ms;
    if ends_ms == 0 {
        return;
    }
    // One that does not say is of a program that made them all for the same time.
    let life_ms = match facts.certificate_life_ms {
        0 => ms(LEAF_VALIDITY),
        life_ms => life_ms,
    };
    let whose = format!("metad {}", member.name);
    let advice = "see in its log why, and run qsfs certificate renew --data DIR there";
    let subject = member.name.as_str();
    certificates::one((&whose, subject), (ends_ms, life_ms), now_ms, advice, found);
}

fn versions(picture: &Picture<'_>, found: &mut Vec<Finding>) {
    let known = picture.nodes.iter().flatten();
    let programs: BTreeSet<_> = known.clone().map(|facts| facts.program.as_str()).collect();
    let levels: BTreeSet<_> = known.map(|facts| facts.feature_level).collect();
    if programs.len() > 1 || levels.len() > 1 {
        let programs: Vec<_> = programs.into_iter().collect();
        let text = format!(
            "the metad nodes run different programs ({}): what only the newest can do waits until all are upgraded, one at a time",
            programs.join(", ")
        );
        found.push(finding(
            "METAD_VERSIONS",
            "metad",
            StatusVerdict::Warning,
            text,
        ));
    }
}

#[cfg(test)]
#[path = "metads/tests.rs"]
mod tests;
