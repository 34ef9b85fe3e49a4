//! What is worth telling: named findings, each with a subject and one sentence.

use super::certificates::{self, Certificates};
use super::metads;
use crate::node::facts::NodeFacts;
use crate::state::backends::BackendLoad;
use qsfs_proto::api::{Backend, BackendFacts, Intent, Member, Verdict};
use qsfs_proto::status::{Finding, ResilverStatus, StatusVerdict, VolumeStatus};
use qsfs_zstor::id::BackendId;
use std::collections::BTreeMap;

/// Beyond the push interval, a push may take so long before its lateness is told.
const PUSH_TIME_S: u64 = 5 * 60;

/// A backend with less than this share of its capacity free is full, in percent.
const FULL_BELOW_PERCENT: u64 = 2;

/// One volume, with what is told but not part of the contract.
#[derive(Debug, Clone, Default)]
pub struct VolumePicture {
    /// As shown.
    pub status: VolumeStatus,
    /// Push interval.
    pub push_interval_ms: u64,
    /// Why its writer cannot push.
    pub push_blocked: String,
    /// Its writer was not heard: for so many seconds, or never by this leader.
    pub silent_writer_s: Option<Option<u64>>,
}

/// Everything that findings are drawn from.
#[derive(Debug)]
pub struct Picture<'a> {
    /// Backends and what they hold.
    pub backends: &'a [(Backend, BackendLoad)],
    /// What they said.
    pub facts: &'a BTreeMap<BackendId, BackendFacts>,
    /// Volumes.
    pub volumes: &'a [VolumePicture],
    /// metads.
    pub members: &'a [Member],
    /// What each of them says of itself, in the same order.
    pub nodes: &'a [Option<NodeFacts>],
    /// Certificates.
    pub certificates: &'a Certificates,
    /// Now, ms since the epoch.
    pub now_ms: u64,
    /// Drawn on the leader, who hears the others.
    pub leads: bool,
    /// The leader has not looked at all records yet.
    pub counting: bool,
    /// Shards reported missing or corrupt and not made again yet.
    pub bad_shards: u64,
    /// Re-silver.
    pub resilver: &'a ResilverStatus,
}

pub(super) fn finding(
    name: &str,
    subject: impl ToString,
    severity: StatusVerdict,
    text: String,
) -> Finding {
    Finding {
        name: name.to_owned(),
        subject: subject.to_string(),
        text,
        severity,
    }
}

/// All findings.
pub fn find(picture: &Picture<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    silence(picture, &mut found);
    rooms(picture, &mut found);
    for volume in picture.volumes {
        volume_findings(volume, &mut found);
    }
    if picture.counting {
        let text = if picture.leads {
            "the leading metad has not looked at all records yet since it leads or since backends changed: what is missing may be more \
             than is said here"
        } else {
            "this metad does not lead and has not looked at all records yet: what is missing may be more than is said here"
        };
        found.push(finding(
            "STILL_COUNTING",
            "records",
            StatusVerdict::Warning,
            text.to_owned(),
        ));
    }
    if picture.bad_shards > 0 {
        let text = format!(
            "{} shards were found missing or corrupt and are being made again",
            picture.bad_shards
        );
        found.push(finding(
            "SHARDS_BAD",
            "shards",
            StatusVerdict::Warning,
            text,
        ));
    }
    let unwell = picture.resilver.pending_shards > 0
        || picture.volumes.iter().any(|v| v.status.below_policy > 0);
    if let (true, true, Some(waiting)) = (unwell, picture.leads, &picture.resilver.waiting_for) {
        let text = format!("re-silver waits for: {waiting}");
        found.push(finding(
            "RESILVER_WAITING",
            "resilver",
            StatusVerdict::Warning,
            text,
        ));
    }
    metads::find(picture, &mut found);
    certificates::find(picture.certificates, picture.now_ms, &mut found);
    found
}

fn is_silent(backend: &Backend) -> bool {
    matches!(backend.verdict, Verdict::Down | Verdict::Lost)
}

/// Still of concern: silent, and not just lost with nothing left on it.
fn concerns(backend: &Backend, load: &BackendLoad, below_policy: bool) -> bool {
    backend.verdict == Verdict::Down || load.shards > 0 || below_policy
}

/// Backends by node.
type Nodes<'a> = BTreeMap<&'a str, Vec<&'a (Backend, BackendLoad)>>;

/// The largest thing that is silent is told, not its parts.
fn silence(picture: &Picture<'_>, found: &mut Vec<Finding>) {
    let below_policy = picture.volumes.iter().any(|v| v.status.below_policy > 0);
    let mut locations: BTreeMap<&str, Nodes<'_>> = BTreeMap::new();
    for entry in picture.backends {
        if entry.0.intent != Intent::Retire {
            let nodes = locations.entry(entry.0.location.as_str()).or_default();
            nodes.entry(entry.0.node.as_str()).or_default().push(entry);
        }
    }
    for (location, nodes) in locations {
        let all: Vec<_> = nodes.values().flatten().collect();
        if all.iter().all(|(backend, _)| is_silent(backend)) {
            if all.iter().any(|(b, load)| concerns(b, load, below_policy)) {
                let text = format!(
                    "location {location} is down: none of its {} backends answers",
                    all.len()
                );
                found.push(finding(
                    "LOCATION_DOWN",
                    location,
                    StatusVerdict::Warning,
                    text,
                ));
            }
            continue;
        }
        for (node, backends) in nodes {
            silent_node(picture, (location, node), &backends, found);
        }
    }
}

fn silent_node(
    picture: &Picture<'_>,
    (location, node): (&str, &str),
    backends: &[&(Backend, BackendLoad)],
    found: &mut Vec<Finding>,
) {
    let silent: Vec<_> = backends
        .iter()
        .filter(|(backend, load)| is_silent(backend) && concerns(backend, load, false))
        .collect();
    let unreported = |id: &BackendId| picture.facts.get(id).is_none_or(|facts| facts.healthy);
    if silent.len() == backends.len() && silent.iter().all(|(b, _)| unreported(&b.id)) {
        let text = format!("node {node} at {location} does not answer");
        let subject = format!("{location}/{node}");
        found.push(finding("NODE_DOWN", subject, StatusVerdict::Warning, text));
        return;
    }
    for (backend, load) in silent {
        let problem = picture
            .facts
            .get(&backend.id)
            .map_or("", |f| f.problem.as_str());
        let why = if problem.is_empty() {
            "does not answer".to_owned()
        } else {
            format!("failed: {problem}")
        };
        let text = format!(
            "backend {} on {location}/{node} {why}; {} shards are to be made again if it stays so",
            backend.id, load.shards
        );
        found.push(finding(
            "BACKEND_DOWN",
            backend.id,
            StatusVerdict::Warning,
            text,
        ));
    }
}

fn rooms(picture: &Picture<'_>, found: &mut Vec<Finding>) {
    for (backend, _) in picture.backends {
        let Some(facts) = picture.facts.get(&backend.id) else {
            continue;
        };
        let least = backend.capacity_bytes / 100 * FULL_BELOW_PERCENT;
        if facts.healthy && backend.intent == Intent::Serve && facts.free_bytes < least {
            let text = format!(
                "backend {} on {}/{} is full: {} bytes are free",
                backend.id, backend.location, backend.node, facts.free_bytes
            );
            found.push(finding(
                "BACKEND_FULL",
                backend.id,
                StatusVerdict::Warning,
                text,
            ));
        }
    }
}

fn volume_findings(volume: &VolumePicture, found: &mut Vec<Finding>) {
    let status = &volume.status;
    let name = &status.name;
    if status.unreadable > 0 {
        let text = format!(
            "{} of {} datafiles of {name} have too few shards that answer: reading them fails until backends return",
            status.unreadable, status.datafiles
        );
        found.push(finding(
            "DATA_UNREADABLE",
            name,
            StatusVerdict::Critical,
            text,
        ));
    }
    if status.below_policy > 0 {
        let (severity, what) = if status.loss_budget.backends == 0 {
            (
                StatusVerdict::Critical,
                "the next loss makes data unavailable",
            )
        } else {
            (
                StatusVerdict::Warning,
                "data is available, with less to spare",
            )
        };
        let text = format!(
            "{} of {} datafiles of {name} are below its policy {}: {what}",
            status.below_policy, status.datafiles, status.policy
        );
        found.push(finding("POLICY_BELOW", name, severity, text));
    }
    let late_s = volume.push_interval_ms / 1_000 + PUSH_TIME_S;
    if status.at_risk_age_s > late_s {
        let text = format!(
            "{} bytes of {name} are only on the client's disk, the oldest for {} s",
            status.at_risk_bytes, status.at_risk_age_s
        );
        found.push(finding("AT_RISK_AGE", name, StatusVerdict::Warning, text));
    }
    if !volume.push_blocked.is_empty() {
        let text = format!("{name} cannot be pushed: {}", volume.push_blocked);
        found.push(finding("PUSH_BLOCKED", name, StatusVerdict::Warning, text));
    }
    if let Some(silent_s) = volume.silent_writer_s {
        let since = silent_s.map_or("by this leader".to_owned(), |s| format!("for {s} s"));
        let text = format!(
            "the writer of {name} was not heard {since}: what is at risk there is not known"
        );
        found.push(finding(
            "AT_RISK_UNKNOWN",
            name,
            StatusVerdict::Warning,
            text,
        ));
    }
}
