//! Every process renews its own certificate while the present one is still good, and takes the new one into use as it runs.
//!
//! ```text
//! at about two thirds of its life: new key -> signing request -> Signer -> Home (durable) -> LiveIdentity (new connections)
//! ```
//!
//! When is decided by [`plan`], pure. The signer is a metad that knows us by our present certificate and copies who we are from it
//! ([`MetadClient`]), or the authority itself (a metad). What fails is tried again, ever more slowly, and until the end there is a
//! third of the life for it. Who finds a newer certificate in its home takes that: another process that shares the home, or a person,
//! has renewed it.

use crate::api::MetadError;
use crate::client::MetadClient;
use crate::context::{Context, ContextError};
use crate::identity::{Identity, IdentityError, KeyRequest, LiveIdentity, Validity, wall_ms};
use async_trait::async_trait;
use rand::Rng;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Renewed between these shares of its life; where in between is drawn by every process for itself, so that those which joined
/// together do not all come together.
const DUE_SHARES: (f64, f64) = (0.60, 0.70);
/// First pause after a failure, as a share of the life; doubles.
const RETRY_SHARE: u32 = 1_000;
/// Shortest pause after a failure, and between two looks.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause after a failure, as a share of the life and at all.
const RETRY_SHARE_MAX: u32 = 40;
/// See [`RETRY_SHARE_MAX`].
const RETRY_MAX: Duration = Duration::from_secs(3_600);
/// The home is looked at at least so often: a person may have renewed by hand, and clocks jump.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// One signature, with all attempts of the client.
const SIGN_DEADLINE: Duration = Duration::from_secs(60);

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// No signature.
    #[error("asking for a certificate: {0}")]
    Refused(#[from] MetadError),
    /// What came cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A cluster file.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// Another home.
    #[error("keeping the certificate: {0}")]
    Home(#[source] Box<dyn Error + Send + Sync>),
    /// The task that reads and writes files ended.
    #[error("keeping the certificate: its task ended")]
    Task,
}

/// Who signs for us.
#[async_trait]
pub trait Signer: Send + Sync + 'static {
    /// A certificate (PEM) for the key of the request, of who we are.
    async fn sign(&self, csr_pem: &str) -> Result<String, MetadError>;
}

#[async_trait]
impl Signer for MetadClient {
    async fn sign(&self, csr_pem: &str) -> Result<String, MetadError> {
        self.renew_certificate(csr_pem).await
    }
}

/// Where an identity is kept between runs. Its methods do file I/O.
pub trait Home: Send + Sync + 'static {
    /// What is kept.
    fn load(&self) -> Result<Identity, RenewalError>;
    /// Keeps it durably, unless what is kept ends later; answers with what is kept then.
    fn keep(&self, identity: &Identity) -> Result<Identity, RenewalError>;
}

/// The identity directory of a metad or an agent.
#[derive(Debug, Clone)]
pub struct IdentityDir(pub PathBuf);

impl Home for IdentityDir {
    fn load(&self) -> Result<Identity, RenewalError> {
        Ok(Identity::load(&self.0)?)
    }

    fn keep(&self, identity: &Identity) -> Result<Identity, RenewalError> {
        Ok(identity.save_newer(&self.0)?)
    }
}

/// A cluster file, which commands and mounts share.
#[derive(Debug, Clone)]
pub struct ClusterFile(pub PathBuf);

impl Home for ClusterFile {
    fn load(&self) -> Result<Identity, RenewalError> {
        Ok(Context::load(&self.0)?.identity().clone())
    }

    fn keep(&self, identity: &Identity) -> Result<Identity, RenewalError> {
        let kept = Context::update(&self.0, |context| {
            if context.identity().supersedes(identity) {
                context
            } else {
                context.with_identity(identity.clone())
            }
        });
        Ok(kept?.identity().clone())
    }
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, for so long.
    Wait(Duration),
    /// Ask for a new certificate.
    Renew,
    /// Try again to keep the one in use.
    Keep,
}

/// What is known of a certificate in use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Situation {
    /// From when to when it is good.
    pub validity: Validity,
    /// It is in use, but could not be kept.
    pub unkept: bool,
    /// Failures since the last success.
    pub failures: u32,
    /// When the last one was, ms since the epoch.
    pub failed_ms: u64,
    /// 0 to 1, drawn once for this certificate.
    pub spread: f64,
}

/// What is to be done about a certificate now. Clocks may jump either way.
pub fn plan(of: Situation, now_ms: u64) -> Step {
    let life = Duration::from_millis(of.validity.life_ms());
    let spread = of.spread.clamp(0.0, 1.0);
    let share = DUE_SHARES.0 + (DUE_SHARES.1 - DUE_SHARES.0) * spread;
    let left_then_ms = ms(life.mul_f64(1.0 - share));
    let (step, mut at_ms) = if of.unkept {
        (Step::Keep, 0)
    } else {
        let due_ms = of.validity.ends_ms.saturating_sub(left_then_ms);
        (Step::Renew, due_ms)
    };
    if of.failures > 0 {
        let first = (life / RETRY_SHARE).max(PAUSE_MIN);
        let longest = (life / RETRY_SHARE_MAX).clamp(PAUSE_MIN, RETRY_MAX);
        let doubled = first.saturating_mul(1 << (of.failures - 1).min(20));
        let pause = doubled.min(longest).mul_f64(0.5 + spread / 2.0);
        // A clock that went back must not make the pause longer.
        let since_ms = of.failed_ms.min(now_ms);
        at_ms = at_ms.max(since_ms.saturating_add(ms(pause)));
    }
    if now_ms >= at_ms {
        step
    } else {
        Step::Wait(Duration::from_millis(at_ms - now_ms))
    }
}

/// A new key, and a certificate for it of who `current` is.
pub async fn request(signer: &dyn Signer, current: &Identity) -> Result<Identity, RenewalError> {
    let key = KeyRequest::new()?;
    let signed = tokio::time::timeout(SIGN_DEADLINE, signer.sign(key.csr_pem())).await;
    let certificate = signed
        .map_err(|_| MetadError::Unreachable(format!("no signature within {SIGN_DEADLINE:?}")))??;
    let identity = key.finish(certificate, current.ca_pem().to_owned())?;
    if identity.peer() != current.peer() {
        return Err(IdentityError::OtherIdentity {
            found: identity.peer().clone(),
            wanted: current.peer().clone(),
        }
        .into());
    }
    identity.check_not_ended(
        wall_ms(),
        "what was signed ends at once; compare the clocks",
    )?;
    Ok(identity)
}

fn ms(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Renews the identity of a process for as long as it runs.
pub struct Renewal {
    live: LiveIdentity,
    home: Arc<dyn Home>,
    signer: Arc<dyn Signer>,
    /// What its owner does when the certificate has ended, for the log.
    advice: &'static str,
    unkept: bool,
    failures: u32,
    failed_ms: u64,
    spread: f64,
}

impl Renewal {
    /// `advice` says what to do when it could not be renewed until its end.
    pub fn new(
        live: LiveIdentity,
        home: Arc<dyn Home>,
        signer: Arc<dyn Signer>,
        advice: &'static str,
    ) -> Self {
        Self {
            live,
            home,
            signer,
            advice,
            unkept: false,
            failures: 0,
            failed_ms: 0,
            spread: rand::rng().random(),
        }
    }

    /// Until `stop`. `renewed` is told of every certificate that is taken into use.
    pub async fn run(mut self, renewed: impl Fn(&Identity) + Send, stop: CancellationToken) {
        loop {
            let pause = tokio::select! {
                pause = self.step(&renewed) => pause,
                () = stop.cancelled() => return,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Looks, and renews if it is time. Answers when to look again.
    pub async fn step(&mut self, renewed: &(impl Fn(&Identity) + Send)) -> Duration {
        let before = self.live.generation();
        let stepped = self.try_step(wall_ms()).await;
        if self.live.generation() != before {
            let identity = self.live.current();
            tracing::info!(peer = %identity.peer(), "a new certificate is in use");
            self.spread = rand::rng().random();
            self.failures = 0;
            renewed(&identity);
        }
        match stepped {
            Ok(pause) => pause.clamp(PAUSE_MIN, LOOK_MAX),
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                self.failed_ms = wall_ms();
                let current = self.live.current();
                match current.check_not_ended(self.failed_ms, self.advice) {
                    Err(ended) => tracing::error!(%error, "{ended}"),
                    Ok(()) => {
                        tracing::warn!(%error, "the certificate was not renewed; it is tried again")
                    }
                }
                PAUSE_MIN
            }
        }
    }

    async fn try_step(&mut self, now_ms: u64) -> Result<Duration, RenewalError> {
        let current = self.live.current();
        let home = Arc::clone(&self.home);
        // A home that cannot be read is no reason not to renew.
        if let Ok(kept) = blocking(move || home.load()).await
            && kept.supersedes(&current)
        {
            self.live.replace(kept)?;
            self.unkept = false;
            return Ok(Duration::ZERO);
        }
        let situation = Situation {
            validity: current.validity()?,
            unkept: self.unkept,
            failures: self.failures,
            failed_ms: self.failed_ms,
            spread: self.spread,
        };
        let identity = match plan(situation, now_ms) {
            Step::Wait(pause) => return Ok(pause),
            Step::Keep => current,
            Step::Renew => {
                let identity = request(&*self.signer, &current).await?;
                // In use first: should it not be possible to keep it, this process goes on at least.
                self.live.replace(identity.clone())?;
                self.unkept = true;
                identity
            }
        };
        let home = Arc::clone(&self.home);
        blocking(move || home.keep(&identity)).await?;
        self.unkept = false;
        self.failures = 0;
        Ok(Duration::ZERO)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RenewalError> + Send + 'static,
) -> Result<T, RenewalError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(RenewalError::Task))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, prop_assert, prop_assert_eq, proptest};

    fn situation(validity: Validity, spread: f64) -> Situation {
        Situation {
            validity,
            unkept: false,
            failures: 0,
            failed_ms: 0,
            spread,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn it_is_due_between_three_and_seven_tenths_of_its_life(
            issued_ms in 100_000_000_u64..4_000_000_000_000,
            life_ms in 1_000_u64..700_000_000_000,
            spread in 0.0..1.0_f64,
        ) {
            let validity = Validity::for_life(issued_ms, life_ms);
            prop_assert_eq!(validity.life_ms(), life_ms);
            let at = |share: f64| issued_ms + ms(Duration::from_millis(life_ms).mul_f64(share));
            let of = situation(validity, spread);
            let early = plan(of, at(0.599));
            prop_assert!(matches!(early, Step::Wait(_)), "{:?}", early);
            prop_assert_eq!(plan(of, at(0.701) + 1), Step::Renew);
            // Waiting as long as it says is enough.
            let Step::Wait(wait) = plan(of, issued_ms) else { panic!("just made") };
            prop_assert_eq!(plan(of, issued_ms + ms(wait)), Step::Renew);
        }

        #[test]
        fn failures_slow_it_down_but_leave_many_tries_whatever_the_clock_does(
            life_ms in 10_000_u64..700_000_000_000,
            spread in 0.0..1.0_f64,
            failures in 1_u32..1_000,
            jump in -1_000_000_i64..1_000_000,
        ) {
            let issued_ms = 1_000_000_000_000;
            let validity = Validity::for_life(issued_ms, life_ms);
            let now_ms = validity.ends_ms - 1;
            let of = Situation { failures, failed_ms: now_ms.saturating_add_signed(jump), ..situation(validity, spread) };
            if let Step::Wait(wait) = plan(of, now_ms) {
                // At least ten tries in the last third.
                prop_assert!(ms(wait) <= (life_ms / 30).max(100), "{:?}", wait);
            }
            prop_assert!(plan(of, now_ms + life_ms / 30 + 1_000_000 + 100) == Step::Renew);
        }
    }

    #[test]
    fn what_could_not_be_kept_is_kept_first() {
        let validity = Validity::for_life(1_000_000_000_000, 1_000_000);
        let of = Situation {
            unkept: true,
            failures: 1,
            failed_ms: validity.begins_ms,
            ..situation(validity, 0.5)
        };
        assert!(matches!(plan(of, validity.begins_ms), Step::Wait(_)));
        assert_eq!(plan(of, validity.ends_ms), Step::Keep);
    }
}
