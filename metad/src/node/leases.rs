//! No lease changes hands by a clock alone: the leader must itself have waited for as long as a lease lives, and a margin, since it last
//! heard of its holder, or since it leads.
//!
//! The state refuses to give a living lease away, by log time. Log time comes from the leaders' clocks, and these differ: right after a
//! change of leader a lease may seem to have ended that was renewed a moment ago. So before a lease is taken from somebody (or
//! its volume deleted) the leader asks its own steady clock, which nobody sets, once it has applied all that was granted before: a new leader
//! may be behind. A takeover asks nobody.

use crate::state::command::Request;
use qsfs_proto::api::{MetadError, Mutation, Volume};
use qsfs_zstor::id::{ClientId, VolumeId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Share of a lease's life that is waited for beyond it.
const MARGIN_SHARE: u32 = 10;
/// Holders remembered at most. Of a forgotten one it counts when the leader began to lead, or when it began to forget.
const HOLDERS_MAX: usize = 65_536;

/// What a leader knows of holders, during its term.
#[derive(Debug)]
pub struct Holders {
    /// Of those that are not listed.
    since: Instant,
    heard: BTreeMap<VolumeId, Instant>,
}

impl Default for Holders {
    fn default() -> Self {
        Self::leading_since(Instant::now())
    }
}

impl Holders {
    /// Nobody was heard yet.
    pub fn leading_since(now: Instant) -> Self {
        Self {
            since: now,
            heard: BTreeMap::new(),
        }
    }

    /// The holder of a volume's lease asked for something at this time, which may have been granted.
    pub fn heard(&mut self, volume: VolumeId, at: Instant) {
        if self.heard.len() >= HOLDERS_MAX && !self.heard.contains_key(&volume) {
            self.heard.clear();
            self.since = at;
        }
        self.heard.insert(volume, at);
    }

    /// May the lease be taken from its holder, when leases live for `ttl`?
    pub fn may_take(&self, volume: VolumeId, ttl: Duration, now: Instant) -> bool {
        let heard = self.heard.get(&volume).copied().unwrap_or(self.since);
        let silent = now.saturating_duration_since(heard.max(self.since));
        silent >= ttl + ttl / MARGIN_SHARE
    }
}

/// Refusals remembered at most; then they are forgotten, and a request that arrives once more is looked at anew.
const REFUSED_MAX: usize = 16_384;

/// What a leader did not propose since a lease lives: it stays refused if the same request arrives once more when the lease has ended. Who
/// was told that it has no lease must not be given one.
#[derive(Debug, Default)]
pub struct Refused(BTreeMap<(ClientId, u64, u64), MetadError>);

impl Refused {
    fn name(request: &Request) -> (ClientId, u64, u64) {
        (request.client, request.session, request.sequence)
    }

    /// What this request was answered.
    pub fn get(&self, request: &Request) -> Option<MetadError> {
        self.0.get(&Self::name(request)).cloned()
    }

    /// It was answered this.
    pub fn note(&mut self, request: &Request, refused: MetadError) {
        if self.0.len() >= REFUSED_MAX {
            self.0.clear();
        }
        self.0.insert(Self::name(request), refused);
    }
}

/// The volume whose lease a mutation takes from whoever holds it, if it does so for the passing of time.
pub(super) fn takes(mutation: &Mutation) -> Option<VolumeId> {
    match mutation {
        Mutation::AcquireLease {
            volume,
            takeover: false,
            ..
        }
        | Mutation::DeleteVolume { volume } => Some(*volume),
        _ => None,
    }
}

/// The volume whose lease a mutation makes live longer.
pub(super) fn prolongs(mutation: &Mutation) -> Option<VolumeId> {
    match mutation {
        Mutation::AcquireLease { volume, .. } | Mutation::RenewLease { volume, .. } => {
            Some(*volume)
        }
        _ => None,
    }
}

/// Whom it would be taken from: nobody, if the volume is free or the lease is the asker's own.
pub(super) fn check(
    mutation: &Mutation,
    volume: &Volume,
    may_take: impl FnOnce() -> bool,
) -> Result<(), MetadError> {
    let Some(lease) = &volume.lease else {
        return Ok(());
    };
    let own = matches!(mutation, Mutation::AcquireLease { client, .. } if *client == lease.client);
    if own || may_take() {
        return Ok(());
    }
    Err(MetadError::Held {
        holder: lease.holder.clone(),
        epoch: volume.epoch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    const TTL: Duration = Duration::from_secs(30);

    fn volume(id: u8) -> VolumeId {
        VolumeId::from_bytes([id; 16])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Against a list of everything that was heard.
        #[test]
        fn a_lease_may_be_taken_when_its_holder_was_silent_for_its_life_and_a_tenth(
            heard in proptest::collection::vec((0_u8..4, 0_u64..100), 0..40),
            at in 0_u64..140,
        ) {
            let began = Instant::now();
            let after = |seconds: u64| began + Duration::from_secs(seconds);
            let mut heard = heard;
            heard.sort_by_key(|(_, seconds)| *seconds);
            let mut holders = Holders::leading_since(began);
            for (id, seconds) in &heard {
                holders.heard(volume(*id), after(*seconds));
            }
            for id in 0..4 {
                let last = heard.iter().filter(|(of, _)| *of == id).map(|(_, at)| *at).max();
                let may = holders.may_take(volume(id), TTL, after(at));
                prop_assert_eq!(may, at >= last.unwrap_or(0) + 33);
            }
        }
    }

    #[test]
    fn what_was_refused_stays_refused_for_that_request_alone() {
        let request = |sequence| Request {
            client: ClientId::from_bytes([7; 16]),
            session: 1,
            sequence,
            oldest_pending: 0,
        };
        let mut refused = Refused::default();
        refused.note(&request(5), MetadError::NoSuchVolume("v".into()));
        assert!(refused.get(&request(5)).is_some());
        // It knows by then that fewer answers are waited for.
        let again = Request {
            oldest_pending: 4,
            ..request(5)
        };
        assert!(refused.get(&again).is_some());
        assert!(refused.get(&request(6)).is_none());
        for sequence in 10..10 + REFUSED_MAX as u64 {
            refused.note(&request(sequence), MetadError::NoSuchVolume("v".into()));
        }
        assert!(refused.0.len() <= REFUSED_MAX);
        assert!(refused.get(&request(9 + REFUSED_MAX as u64)).is_some());
    }

    #[test]
    fn who_is_forgotten_is_waited_for_as_if_just_heard() {
        let began = Instant::now();
        let mut holders = Holders::leading_since(began);
        let late = began + TTL * 10;
        for number in 0..=u32::try_from(HOLDERS_MAX).unwrap_or(0) {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_le_bytes());
            holders.heard(VolumeId::from_bytes(id), late);
        }
        assert!(!holders.may_take(VolumeId::from_bytes([0; 16]), TTL, late + TTL));
        assert!(!holders.may_take(volume(200), TTL, late + TTL));
        assert!(holders.may_take(volume(200), TTL, late + TTL * 2));
    }
}
