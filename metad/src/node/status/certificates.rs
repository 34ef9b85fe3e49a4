//! What is worth telling of certificates. All renew themselves when a third of their life is left, so one that is told of could not be.

use super::findings::finding;
use qsfs_proto::status::{Finding, StatusVerdict};
use std::time::Duration;

const DAY_MS: u64 = 24 * 3_600_000;
/// A certificate that ends within is told, or within this share of its life if that is less.
const SOON: (u64, u64) = (30 * DAY_MS, 6);
/// The same, critical.
const LAST: (u64, u64) = (3 * DAY_MS, 24);
/// The authority ends within: told.
const AUTHORITY_SOON: Duration = Duration::from_secs(2 * 366 * 24 * 3_600);
/// The same, critical.
const AUTHORITY_LAST: Duration = Duration::from_secs(183 * 24 * 3_600);

/// What is known of certificates besides those of metads. Times in ms since the epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Certificates {
    /// When the cluster's authority ends; 0: unknown.
    pub authority_expires_ms: u64,
    /// For how long certificates are made.
    pub life_ms: u64,
    /// Agents that showed theirs, by `location/node`, and when it ends.
    pub agents: Vec<(String, u64)>,
}

/// How bad it is that a certificate made for `life_ms` ends in `left_ms`, if at all.
fn severity(left_ms: u64, life_ms: u64) -> Option<StatusVerdict> {
    let within = |(at_most, share): (u64, u64)| left_ms <= at_most.min(life_ms / share);
    match (within(LAST), within(SOON)) {
        (true, _) => Some(StatusVerdict::Critical),
        (_, true) => Some(StatusVerdict::Warning),
        _ => None,
    }
}

fn left(left_ms: u64) -> String {
    match left_ms {
        0 => "has ended".into(),
        1..DAY_MS => format!("ends in {} minutes", left_ms / 60_000),
        _ => format!("ends in {} days", left_ms / DAY_MS),
    }
}

/// One process's; `whose` as in `metad m1`.
pub(super) fn one(
    (whose, subject): (&str, &str),
    (expires_ms, life_ms): (u64, u64),
    now_ms: u64,
    advice: &str,
    found: &mut Vec<Finding>,
) {
    let left_ms = expires_ms.saturating_sub(now_ms);
    if let Some(severity) = severity(left_ms, life_ms) {
        let text = format!(
            "the certificate of {whose} {} and was not renewed, then nobody can connect to it; {advice}",
            left(left_ms)
        );
        found.push(finding("CERTIFICATE_EXPIRES", subject, severity, text));
    }
}

pub(super) fn find(certificates: &Certificates, now_ms: u64, found: &mut Vec<Finding>) {
    for (place, expires_ms) in &certificates.agents {
        let whose = format!("agent {place}");
        let advice = "see in its log why, and run qsfs certificate renew --data DIR there";
        let ends = (*expires_ms, certificates.life_ms);
        one((&whose, place), ends, now_ms, advice, found);
    }
    let ends_ms = certificates.authority_expires_ms;
    let left_ms = ends_ms.saturating_sub(now_ms);
    let within = |span: Duration| u128::from(left_ms) <= span.as_millis();
    if ends_ms > 0 && within(AUTHORITY_SOON) {
        let severity = if within(AUTHORITY_LAST) {
            StatusVerdict::Critical
        } else {
            StatusVerdict::Warning
        };
        let text = format!(
            "the authority of the cluster {}, and all certificates with it; plan the move to a new cluster (qsfs explain AUTHORITY_EXPIRES)",
            left(left_ms)
        );
        found.push(finding("AUTHORITY_EXPIRES", "cluster", severity, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 20_000 * DAY_MS;

    fn told(certificates: &Certificates) -> Vec<(String, String, StatusVerdict)> {
        let mut found = Vec::new();
        find(certificates, NOW_MS, &mut found);
        let found = found.into_iter();
        found.map(|f| (f.name, f.subject, f.severity)).collect()
    }

    #[test]
    fn an_agent_that_was_not_renewed_is_told_in_proportion_to_its_life() {
        let agent = |life_days: u64, left_ms: u64| Certificates {
            life_ms: life_days * DAY_MS,
            agents: vec![("ams/n1".into(), NOW_MS + left_ms)],
            ..Certificates::default()
        };
        let one = |severity| vec![("CERTIFICATE_EXPIRES".into(), "ams/n1".into(), severity)];
        // A third of the life is left when it is renewed: nothing to tell, however short the life is.
        assert!(told(&agent(732, 244 * DAY_MS)).is_empty());
        assert!(told(&agent(30, 10 * DAY_MS)).is_empty());
        assert_eq!(told(&agent(732, 30 * DAY_MS)), one(StatusVerdict::Warning));
        assert_eq!(told(&agent(30, 5 * DAY_MS)), one(StatusVerdict::Warning));
        assert_eq!(told(&agent(732, 3 * DAY_MS)), one(StatusVerdict::Critical));
        assert_eq!(told(&agent(30, DAY_MS)), one(StatusVerdict::Critical));
        assert_eq!(told(&agent(30, 0)), one(StatusVerdict::Critical));
    }

    #[test]
    fn the_end_of_the_authority_is_told_years_before() {
        let ends_in = |days: u64| Certificates {
            authority_expires_ms: NOW_MS + days * DAY_MS,
            ..Certificates::default()
        };
        let one = |severity| vec![("AUTHORITY_EXPIRES".into(), "cluster".into(), severity)];
        assert!(told(&ends_in(733)).is_empty());
        assert_eq!(told(&ends_in(732)), one(StatusVerdict::Warning));
        assert_eq!(told(&ends_in(183)), one(StatusVerdict::Critical));
        assert!(told(&Certificates::default()).is_empty(), "unknown");
    }
}
