//! `qsfs volume`: one filesystem each, with a policy, a key and a writer.

use crate::exit::{self, Failure};
use crate::session::{self, Session};
use crate::table::{Table, print, print_json};
use crate::units;
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use qsfs_agent::options::parse_size;
use qsfs_fuse_client::kit::create_kit;
use qsfs_proto::api::{Applied, Intent, MetadError, Mutation, Verdict, Volume, VolumeSettings};
use qsfs_proto::identity::KeyRequest;
use qsfs_zstor::id::{BackendId, KeyId, VolumeId, VolumeName};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::placement::{Candidate, Survive, best_survival, smallest_geometry, strictly_meets};
use qsfs_zstor::policy::{Geometry, Policy};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Verbs of `qsfs volume`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume and write its recovery kit
    Create(CreateArguments),
    /// List all
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Everything about one
    Info {
        /// Volume
        name: VolumeName,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Change settings
    Set {
        /// Volume
        name: VolumeName,
        #[command(flatten)]
        settings: SettingArguments,
    },
    /// Delete a volume with all its data
    Rm {
        /// Volume
        name: VolumeName,
        /// Do it; without, only say what would happen
        #[arg(long)]
        apply: bool,
    },
}

/// `qsfs volume create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// Its name
    name: VolumeName,
    /// Data and parity shards [default: the fewest bytes that survive what --survive asks]
    #[arg(long, value_name = "K+M", required_unless_present = "survive")]
    policy: Option<Geometry>,
    /// What must be survivable at once, such as location=1,node=1 [default: the most that the policy can]
    #[arg(long, value_name = "location=N,node=N", value_parser = parse_survive)]
    survive: Option<Survive>,
    /// Where the recovery kit is written [default: ./NAME.kit]
    #[arg(long, value_name = "FILE")]
    kit: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingArguments,
}

/// Settings of a volume.
#[derive(Debug, Args)]
pub(crate) struct SettingArguments {
    /// Data is pushed at the latest so long after it was written [default: 15m]
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    push_interval: Option<Duration>,
    /// A datafile is sealed when it is so large [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    datafile_size: Option<u64>,
    /// Most bytes of user data; 0 is no limit [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    quota: Option<u64>,
}

impl SettingArguments {
    fn over(&self, settings: VolumeSettings) -> VolumeSettings {
        VolumeSettings {
            push_interval_ms: self
                .push_interval
                .map_or(settings.push_interval_ms, units::millis),
            datafile_bytes: self.datafile_size.unwrap_or(settings.datafile_bytes),
            quota_bytes: self.quota.unwrap_or(settings.quota_bytes),
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

fn parse_survive(text: &str) -> Result<Survive, String> {
    let bad = || format!("{text:?} is not of the form location=1,node=1");
    let mut survive = Survive::default();
    for part in text.split(',') {
        let (what, count) = part.split_once('=').ok_or_else(bad)?;
        let count: u32 = count.trim().parse().map_err(|_| bad())?;
        match what.trim() {
            "location" | "locations" => survive.locations = count,
            "node" | "nodes" => survive.nodes = count,
            _ => return Err(bad()),
        }
    }
    Ok(survive)
}

/// Runs one.
pub(crate) async fn run(command: &VolumeCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let session = Session::open(cluster)?;
    match command {
        VolumeCommand::Create(arguments) => create_and_tell(&session, arguments).await,
        VolumeCommand::List { json } => list(&session, *json).await,
        VolumeCommand::Info { name, json } => info(&session, name, *json).await,
        VolumeCommand::Set { name, settings } => set(&session, name, settings).await,
        VolumeCommand::Rm { name, apply } => remove(&session, name, *apply).await,
    }
}

/// A volume to create.
pub(crate) struct NewVolume {
    /// Name.
    pub(crate) name: VolumeName,
    /// Geometry, or the solver's choice.
    pub(crate) geometry: Option<Geometry>,
    /// What must be survivable, or the most that the geometry can.
    pub(crate) survive: Option<Survive>,
    /// Settings.
    pub(crate) settings: VolumeSettings,
    /// Where the recovery kit goes.
    pub(crate) kit: PathBuf,
    /// Also keep a copy where mounts on this machine find it.
    pub(crate) keep_copy: bool,
}

/// Creates a volume, its key and its recovery kit. Should the kit not reach the disk, the volume is deleted again: one
/// whose key is lost would be useless.
pub(crate) async fn create(session: &Session, new: NewVolume) -> anyhow::Result<Volume> {
    if new.kit.exists() {
        bail!(
            "{} exists already; name another file with --kit",
            new.kit.display()
        );
    }
    let policy = choose_policy(session, &new).await?;
    let key_id = KeyId::random(&mut rand::rng());
    let created = session
        .client()
        .mutate(Mutation::CreateVolume {
            id: VolumeId::random(&mut rand::rng()),
            name: new.name,
            policy,
            key_id,
            settings: new.settings,
        })
        .await?;
    let Applied::Volume(volume) = created else {
        bail!("metad answered another question");
    };
    let written = write_kit(session, &volume, &new.kit, new.keep_copy).await;
    if let Err(error) = written {
        let volume = volume.id;
        let undone = session.apply(Mutation::DeleteVolume { volume }).await;
        return Err(error.context(match undone {
            Ok(()) => "the volume was not created".to_owned(),
            Err(also) => format!("the volume exists without a kit; delete it ({also:#})"),
        }));
    }
    Ok(*volume)
}

async fn write_kit(
    session: &Session,
    volume: &Volume,
    path: &Path,
    keep_copy: bool,
) -> anyhow::Result<()> {
    let client = session.client();
    let request = KeyRequest::new()?;
    let certificate = client
        .issue_client_certificate(request.csr_pem(), Some(volume.id))
        .await?;
    let ca = session.context().identity().ca_pem().to_owned();
    let identity = request.finish(certificate, ca)?;
    let members = session.members().await?;
    let endpoints = members.into_iter().map(|member| member.address).collect();
    let key = VolumeKey::generate(&mut rand::rng());
    let kit = create_kit(volume, key, endpoints, identity);
    kit.save(path)?;
    if keep_copy {
        let copy = session::kit_path(&session.state_dir()?, &volume.name);
        let dir = copy.parent().context("a kit has a directory")?;
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        kit.save(&copy)?;
    }
    Ok(())
}

async fn choose_policy(session: &Session, new: &NewVolume) -> anyhow::Result<Policy> {
    let candidates = candidates(session).await?;
    let unmet = |missing: String| {
        Failure::new(
            exit::POLICY_UNMET,
            format!("policy cannot be met: {missing}"),
        )
    };
    let policy = match (new.geometry, new.survive) {
        (Some(geometry), None) => best_survival(geometry, &candidates),
        (Some(geometry), Some(survive)) => strictly_meets(geometry, survive, &candidates),
        (None, survive) => smallest_geometry(survive.unwrap_or_default(), &candidates),
    };
    Ok(policy.map_err(unmet)?)
}

/// The backends that could take shards now.
async fn candidates(session: &Session) -> anyhow::Result<Vec<Candidate>> {
    let facts = session.client().backend_facts().await?;
    let free: BTreeMap<BackendId, u64> = facts
        .iter()
        .map(|fact| (fact.backend, fact.free_bytes))
        .collect();
    let backends = session.client().backends().await?;
    let serving = backends
        .into_iter()
        .filter(|backend| backend.verdict == Verdict::Up && backend.intent == Intent::Serve);
    Ok(serving
        .map(|backend| Candidate {
            backend: backend.id,
            free_bytes: free
                .get(&backend.id)
                .copied()
                .unwrap_or(backend.capacity_bytes),
            location: backend.location,
            node: backend.node,
        })
        .collect())
}

async fn create_and_tell(session: &Session, arguments: &CreateArguments) -> anyhow::Result<()> {
    let kit = arguments
        .kit
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.kit", arguments.name)));
    let new = NewVolume {
        name: arguments.name.clone(),
        geometry: arguments.policy,
        survive: arguments.survive,
        settings: arguments.settings.over(VolumeSettings::default()),
        kit: kit.clone(),
        keep_copy: true,
    };
    let volume = create(session, new).await?;
    print(&format!(
        "volume {} created: {}\n\
         recovery kit: {}\n\
         Keep a copy of the kit elsewhere, not on this machine and not on the backends: with it and the cluster the\n\
         volume can be recovered, without it nobody can, and whoever has it can read the volume.\n",
        volume.name,
        policy_line(&volume.policy),
        kit.canonicalize().unwrap_or(kit).display()
    ))
}

fn policy_line(policy: &Policy) -> String {
    let (data, total) = (policy.geometry.data(), policy.geometry.total());
    format!(
        "policy {}, survives any {} locations, any {} nodes; {:.2} bytes stored per byte",
        policy.geometry,
        policy.survive_locations,
        policy.survive_nodes,
        total as f64 / data as f64
    )
}

async fn list(session: &Session, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json("volumes", &session.client().volumes().await?);
    }
    let status = session.client().status().await?;
    let mut table = Table::new(&["VOLUME", "POLICY", "BYTES", "AT RISK", "EPOCH", "WRITER"]);
    for volume in status.volumes {
        table.row(vec![
            volume.name,
            volume.policy,
            units::bytes(volume.bytes),
            units::bytes(volume.at_risk_bytes),
            volume.epoch.to_string(),
            volume.writer.unwrap_or_else(|| "none".to_owned()),
        ]);
    }
    table.print()
}

async fn info(session: &Session, name: &VolumeName, json: bool) -> anyhow::Result<()> {
    let volume = session.volume(name).await?;
    if json {
        return print_json("volume", &volume);
    }
    let settings = &volume.settings;
    let writer = volume.lease.as_ref().map_or("none".to_owned(), |lease| {
        format!(
            "{}, lease ends {}",
            lease.holder,
            units::until(lease.expires_ms)
        )
    });
    print(&format!(
        "volume {} ({})\n{}\nepoch {}, writer {writer}\nhead: datafile {}, recovery starts at {}\n\
         push interval {}, datafile size {}, quota {}\n",
        volume.name,
        volume.id,
        policy_line(&volume.policy),
        volume.epoch,
        volume.head.datafile,
        volume.head.recover_from,
        units::seconds(settings.push_interval_ms / 1_000),
        units::bytes(settings.datafile_bytes),
        match settings.quota_bytes {
            0 => "none".to_owned(),
            quota => units::bytes(quota),
        },
    ))
}

async fn set(
    session: &Session,
    name: &VolumeName,
    settings: &SettingArguments,
) -> anyhow::Result<()> {
    let volume = session.volume(name).await?;
    let settings = settings.over(volume.settings.clone());
    if settings == volume.settings {
        return print("nothing to change\n");
    }
    let volume = volume.id;
    session
        .apply(Mutation::AlterVolume { volume, settings })
        .await?;
    print("changed; a mount takes it over with its next renewal\n")
}

async fn remove(session: &Session, name: &VolumeName, apply: bool) -> anyhow::Result<()> {
    let volume = session.volume(name).await?;
    if let Some(lease) = &volume.lease
        && lease.expires_ms > units::now_ms()
    {
        return Err(MetadError::Held {
            holder: lease.holder.clone(),
            epoch: volume.epoch,
        }
        .into());
    }
    let status = session.client().status().await?;
    let bytes = status
        .volumes
        .iter()
        .find(|candidate| candidate.name == name.as_str())
        .map_or(0, |volume| volume.bytes);
    if !apply {
        return print(&format!(
            "would delete volume {name} with {}, for good; do it with --apply\n",
            units::bytes(bytes)
        ));
    }
    session
        .apply(Mutation::DeleteVolume { volume: volume.id })
        .await?;
    print(&format!(
        "volume {name} deleted; its pieces are removed after the tombstone grace\n"
    ))
}
