//! Who runs where in a dev cluster: chosen once, kept in `D/dev.toml`, the same at every start.

use super::DevOptions;
use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

/// The volume of every dev cluster.
pub(super) const VOLUME: &str = "dev";

/// Location of what is neither of the storage locations: the third metad and the mount.
const CLIENT_LOCATION: &str = "client";

/// Agents per location, if it has so many backends.
const AGENTS_PER_LOCATION: u32 = 2;

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// A metad node.
    Metad,
    /// An agent.
    Agent,
    /// The mount.
    Mount,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Member {
    /// `metad-1`, `agent-loc1-2`, `mount`.
    pub(super) name: String,
    /// What it does.
    pub(super) kind: Kind,
    /// Where it pretends to be.
    pub(super) location: String,
    /// Loopback address; of the mount its directory.
    pub(super) address: String,
    /// Backends of an agent.
    #[serde(default)]
    pub(super) backends: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    /// False until the volume exists: a start that was cut short is not resumed.
    complete: bool,
    mount: PathBuf,
    options: DevOptions,
    members: Vec<Member>,
}

/// A dev directory and its plan.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
    plan: Plan,
}

impl Layout {
    /// Chooses names and free loopback ports for a new cluster in `dir` (made when missing) and writes them down.
    pub(super) fn create(dir: &Path, mount: &Path, options: DevOptions) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let mut members = metads(options.locations);
        members.extend(agents(&options));
        // All listeners live until the last port is chosen, so that no two members get the same.
        let mut listeners = Vec::new();
        for member in &mut members {
            let listener = TcpListener::bind("127.0.0.1:0").context("finding a free port")?;
            member.address = listener.local_addr()?.to_string();
            listeners.push(listener);
        }
        members.push(Member {
            name: "mount".to_owned(),
            kind: Kind::Mount,
            location: CLIENT_LOCATION.to_owned(),
            address: mount.display().to_string(),
            backends: 0,
        });
        let layout = Self {
            dir: dir.to_owned(),
            plan: Plan {
                complete: false,
                mount: mount.to_owned(),
                options,
                members,
            },
        };
        layout.save()?;
        Ok(layout)
    }

    /// Reads the one in `dir`.
    pub(super) fn load(dir: &Path) -> anyhow::Result<Self> {
        let dir = dir
            .canonicalize()
            .with_context(|| format!("{} is not a dev directory", dir.display()))?;
        let file = Self::file(&dir);
        let text = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "{} is not a dev directory: reading {}",
                dir.display(),
                file.display()
            )
        })?;
        let plan = toml::from_str(&text).with_context(|| format!("{}", file.display()))?;
        Ok(Self { dir, plan })
    }

    /// A plan was written there.
    pub(super) fn exists(dir: &Path) -> bool {
        Self::file(dir).exists()
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join("dev.toml")
    }

    fn save(&self) -> anyhow::Result<()> {
        let file = Self::file(&self.dir);
        std::fs::write(&file, toml::to_string_pretty(&self.plan)?)
            .with_context(|| format!("writing {}", file.display()))
    }

    /// The volume exists: from now on the cluster can be started again.
    pub(super) fn set_complete(&mut self) -> anyhow::Result<()> {
        self.plan.complete = true;
        self.save()
    }

    /// See [`Self::set_complete`].
    pub(super) fn is_complete(&self) -> bool {
        self.plan.complete
    }

    /// Mounts elsewhere from now on.
    pub(super) fn move_mount(&mut self, mount: &Path) -> anyhow::Result<()> {
        self.plan.mount = mount.to_owned();
        for member in &mut self.plan.members {
            if member.kind == Kind::Mount {
                member.address = mount.display().to_string();
            }
        }
        self.save()
    }

    /// `D`.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Admin context.
    pub(super) fn cluster_file(&self) -> PathBuf {
        self.dir.join("cluster.toml")
    }

    /// Recovery kit of the volume.
    pub(super) fn kit_file(&self) -> PathBuf {
        self.dir.join("volume.kit")
    }

    /// Where the volume is mounted.
    pub(super) fn mount(&self) -> &Path {
        &self.plan.mount
    }

    /// Options it was made with.
    pub(super) fn options(&self) -> &DevOptions {
        &self.plan.options
    }

    /// All processes.
    pub(super) fn members(&self) -> &[Member] {
        &self.plan.members
    }

    /// Those of one kind.
    pub(super) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Member> {
        self.members()
            .iter()
            .filter(move |member| member.kind == kind)
    }

    /// By name of process or location; every name must be known.
    pub(super) fn select(&self, names: &[String]) -> anyhow::Result<Vec<&Member>> {
        let mut selected = Vec::<&Member>::new();
        for name in names {
            // `client` would take the mount along, which has a name of its own.
            let matches = |member: &&Member| member.name == *name || member.location == *name;
            let found: Vec<&Member> = self.members().iter().filter(matches).collect();
            if found.is_empty() {
                let known: Vec<&str> = self.members().iter().map(|m| m.name.as_str()).collect();
                bail!(
                    "nothing here is called {name}; there are the processes {} and their locations",
                    known.join(", ")
                );
            }
            for member in found {
                if !selected.contains(&member) {
                    selected.push(member);
                }
            }
        }
        Ok(selected)
    }
}

fn metads(locations: u32) -> Vec<Member> {
    let place = |number: u32| match number {
        1 => "loc1".to_owned(),
        2 if locations >= 2 => "loc2".to_owned(),
        _ => CLIENT_LOCATION.to_owned(),
    };
    (1..=3)
        .map(|number| Member {
            name: format!("metad-{number}"),
            kind: Kind::Metad,
            location: place(number),
            address: String::new(),
            backends: 0,
        })
        .collect()
}

fn agents(options: &DevOptions) -> Vec<Member> {
    let mut agents = Vec::new();
    let per_location = options.backends.min(AGENTS_PER_LOCATION);
    for location in 1..=options.locations {
        for agent in 1..=per_location {
            // Four backends on two agents are two each; an odd one goes to the first.
            let backends = (options.backends + per_location - agent) / per_location;
            agents.push(Member {
                name: format!("agent-loc{location}-{agent}"),
                kind: Kind::Agent,
                location: format!("loc{location}"),
                address: String::new(),
                backends,
            });
        }
    }
    agents
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        options: DevOptions,
    }

    fn layout(arguments: &[&str]) -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::parse_from([&["dev"], arguments].concat()).options;
        let layout = Layout::create(dir.path(), Path::new("/mnt/x"), options).unwrap();
        (dir, layout)
    }

    fn names(members: &[&Member]) -> Vec<String> {
        members.iter().map(|member| member.name.clone()).collect()
    }

    #[test]
    fn the_default_is_that_of_the_contract() {
        let (_dir, layout) = layout(&[]);
        let all: Vec<(&str, &str, u32)> = layout
            .members()
            .iter()
            .map(|m| (m.name.as_str(), m.location.as_str(), m.backends))
            .collect();
        let expected = [
            ("metad-1", "loc1", 0),
            ("metad-2", "loc2", 0),
            ("metad-3", "client", 0),
            ("agent-loc1-1", "loc1", 2),
            ("agent-loc1-2", "loc1", 2),
            ("agent-loc2-1", "loc2", 2),
            ("agent-loc2-2", "loc2", 2),
            ("mount", "client", 0),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn a_location_stands_for_all_its_processes() {
        let (_dir, layout) = layout(&[]);
        let selected = layout
            .select(&["loc1".into(), "agent-loc1-1".into()])
            .unwrap();
        assert_eq!(
            names(&selected),
            ["metad-1", "agent-loc1-1", "agent-loc1-2"]
        );
        let error = layout.select(&["loc9".into()]).unwrap_err().to_string();
        assert!(error.contains("loc9"), "{error}");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let (dir, mut layout) = layout(&["--backends", "3", "--locations", "1"]);
        layout.set_complete().unwrap();
        let again = Layout::load(dir.path()).unwrap();
        assert_eq!(again.members(), layout.members());
        assert_eq!(again.options(), layout.options());
        assert!(again.is_complete());
        let backends: Vec<u32> = again.of_kind(Kind::Agent).map(|m| m.backends).collect();
        assert_eq!(backends, [2, 1]);
    }
}
