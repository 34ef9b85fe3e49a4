//! A run: a cluster, clients, faults by the plan, and in the end all checkers.

mod full_disk;

use super::arena::{Arena, Disk, NODES_MAX, enter_client};
use super::checkers::{Terms, check_all, exactly_once, placement};
use super::final_state::{BackendSite, FinalState, FinalVolume, NodeHash, volume_seen};
use super::history::{Clock, Kind as Ended, Recorder};
use super::plan::{Fault, Kind, Step, Whom, plan};
use super::report::{FaultSeen, Report};
use super::workload::{Actor, Workload, insist};
use anyhow::{Context as _, bail, ensure};
use qsfs_proto::api::{Applied, BackendAddress, Member, Mutation};
use qsfs_proto::client::{MetadClient, PAGE_MAX, Timing};
use qsfs_proto::context::Context;
use qsfs_zstor::id::{BackendId, ClientId, DatafileId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Life of leases: short, so that some end by themselves.
const LEASE_TTL: Duration = Duration::from_secs(3);
/// Until a write goes through again after a fault, and until everybody is well again.
const HEALED_WITHIN: Duration = Duration::from_secs(60);
/// Tries to find all nodes at the same entry when they are stopped.
const SAME_ENTRY_TRIES: u32 = 5;
/// Nodes at the beginning and the end.
const VOTERS: usize = 3;
/// Between two looks at the end.
const SETTLE: Duration = Duration::from_millis(200);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of the plan and the workload.
    pub seed: u64,
    /// Time for faults.
    pub time: Duration,
    /// Which.
    pub kinds: Vec<Kind>,
    /// Clients at once.
    pub clients: usize,
    /// What nodes write to.
    pub disk: Disk,
    /// Where history, end, faults and logs go. It must exist.
    pub out: PathBuf,
    /// Scratch directory. It must exist.
    pub work: PathBuf,
    /// `qsfs`.
    pub binary: PathBuf,
}

struct Run {
    options: Options,
    arena: Arena,
    runtime: Runtime,
    admin: MetadClient,
    context: Context,
    recorder: Recorder,
    began: Instant,
    faults: Vec<FaultSeen>,
    trouble: Vec<String>,
    rng: StdRng,
    /// Ids that nodes had; none comes back for another node.
    ids: Vec<u64>,
    /// Times that a node ended because its disk was full, and said so.
    full: u64,
}

/// Runs it. Only where everything is private: see [`super::arena`].
pub fn run(options: Options) -> anyhow::Result<Report> {
    let steps = plan(options.seed, &options.kinds, options.time);
    let mut run = Run::begin(options)?;
    let workload = run.prepare()?;
    let stop = AtomicBool::new(false);
    let suffered = std::thread::scope(|scope| {
        for number in 0..run.options.clients {
            let (workload, stop) = (&workload, &stop);
            let (context, seed) = (run.context.clone(), run.options.seed);
            scope.spawn(move || {
                if let Err(error) = client(number, &context, seed, workload, stop) {
                    // A client that cannot begin is no evidence of anything: the report counts what was done.
                    eprintln!("client {number}: {error:#}");
                }
            });
        }
        let suffered = run.suffer(&steps);
        stop.store(true, Ordering::Relaxed);
        suffered
    });
    let saved = run.arena.save_logs(&run.options.out);
    suffered?;
    saved?;
    let planned = steps.iter().flat_map(|step| &step.faults);
    let planned = planned.filter(|fault| matches!(fault, Fault::FullDisk(_)));
    if planned.count() > 0 && run.full == 0 {
        let text = "the plan has full disks, and no node met the end of its disk";
        run.trouble.push(text.to_owned());
    }
    run.end(&workload)
}

/// One client's thread.
fn client(
    number: usize,
    context: &Context,
    seed: u64,
    workload: &Workload,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    enter_client(number)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Short: what hangs is given up and another node is asked while the fault still lasts.
    let timing = Timing {
        attempt: Duration::from_millis(1_000),
        connect: Duration::from_millis(500),
        read: Duration::from_millis(2_500),
        mutation: Duration::from_millis(4_000),
        ..Timing::default()
    };
    let mut endpoints = context.endpoints().to_vec();
    let first = number % endpoints.len();
    endpoints.rotate_left(first);
    let mut id = [0; ClientId::LEN];
    id[0] = u8::try_from(number)? + 1;
    let number = number as u64;
    let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000).wrapping_add(number));
    runtime.block_on(async {
        let own = ClientId::from_bytes(id);
        let client = MetadClient::with_timing(endpoints, context.identity(), own, timing)?;
        let think = rng.random_range(1..4);
        let mut actor = Actor::new(workload, client, number, rng);
        while !stop.load(Ordering::Relaxed) {
            actor.act().await;
            tokio::time::sleep(Duration::from_millis(think)).await;
        }
        Ok(())
    })
}

impl Run {
    fn begin(options: Options) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        runtime.spawn(die_when_told());
        let mut arena = Arena::new(
            &options.work,
            &options.binary,
            options.clients,
            options.disk,
        )?;
        let tokens = arena.bootstrap(LEASE_TTL)?;
        ensure!(tokens.len() + 1 >= VOTERS, "too few tokens: {tokens:?}");
        for (number, token) in (1..VOTERS).zip(&tokens) {
            arena.join(number, token)?;
        }
        let file = arena.cluster_file();
        let first = Context::load(&file)?;
        let endpoints = (0..VOTERS).map(|number| arena.address(number)).collect();
        let context = Context::new(endpoints, first.identity().clone(), None);
        // The commands that change members go to whoever is there.
        context.save(&file)?;
        let timing = Timing {
            attempt: Duration::from_secs(2),
            connect: Duration::from_secs(1),
            read: Duration::from_secs(5),
            mutation: Duration::from_secs(10),
            ..Timing::default()
        };
        let own = ClientId::from_bytes([0xad; ClientId::LEN]);
        let all = (0..NODES_MAX).map(|number| arena.address(number)).collect();
        let admin = MetadClient::with_timing(all, context.identity(), own, timing)?;
        let began = Instant::now();
        let clock: Clock =
            Arc::new(move || u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
        let lines = File::create(options.out.join("history.jsonl"))?;
        let recorder = Recorder::to_file(clock, BufWriter::new(lines));
        Ok(Self {
            rng: StdRng::seed_from_u64(!options.seed),
            options,
            arena,
            runtime,
            admin,
            context,
            recorder,
            began,
            faults: Vec::new(),
            trouble: Vec::new(),
            ids: Vec::new(),
            full: 0,
        })
    }

    /// Three voters, and backends to place shards on: two at each of two locations.
    fn prepare(&mut self) -> anyhow::Result<Workload> {
        self.until_voters(VOTERS)?;
        let mut backends = Vec::new();
        for location in ["loc1", "loc2"] {
            let register = Mutation::RegisterAgent {
                location: location.parse()?,
                node: "n1".parse()?,
            };
            let agent = match self.runtime.block_on(insist(&self.admin, register))? {
                Applied::Agent(agent) => agent,
                other => bail!("an agent was answered {other:?}"),
            };
            for namespace in ["a", "b", "c"] {
                let register = Mutation::RegisterBackend {
                    agent,
                    address: BackendAddress {
                        endpoint: format!("{location}:9900"),
                        namespace: namespace.into(),
                        password: None,
                        tls: true,
                    },
                    capacity_bytes: 1 << 40,
                };
                match self.runtime.block_on(insist(&self.admin, register))? {
                    Applied::Backend(backend) => backends.push(backend),
                    other => bail!("a backend was answered {other:?}"),
                }
            }
        }
        // Shards of new records go to two of each location.
        let order: Vec<BackendId> = [0, 1, 3, 4, 2, 5].map(|at: usize| backends[at]).into();
        Ok(Workload::new(self.recorder.clone(), order))
    }

    fn members(&self) -> anyhow::Result<Vec<Member>> {
        Ok(self.runtime.block_on(self.admin.members())?)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits until so many nodes are members, all voters and all well.
    fn until_voters(&mut self, wanted: usize) -> anyhow::Result<Vec<Member>> {
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let members = self.members();
            if let Ok(members) = &members
                && members.len() == wanted
                && members.iter().all(|member| member.voter && member.healthy)
            {
                for member in members {
                    if !self.ids.contains(&member.id.0) {
                        self.ids.push(member.id.0);
                    }
                }
                return Ok(members.clone());
            }
            self.complain_of_the_dead()?;
            if Instant::now() > deadline {
                bail!("not {wanted} healthy voters within {HEALED_WITHIN:?}: {members:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Nobody may end without being told to.
    fn complain_of_the_dead(&mut self) -> anyhow::Result<()> {
        if let Some((number, status)) = self.arena.dead()?.first() {
            bail!(
                "{} ended by itself ({status}):\n{}",
                self.arena.name(*number),
                self.arena.log_end(*number)
            );
        }
        Ok(())
    }

    fn suffer(&mut self, steps: &[Step]) -> anyhow::Result<()> {
        std::thread::sleep(Duration::from_secs(1));
        let end = self.began + self.options.time;
        for step in steps {
            if Instant::now() >= end {
                break;
            }
            self.step(step).with_context(|| {
                format!(
                    "at {step:?}, {:?} after the beginning",
                    self.began.elapsed()
                )
            })?;
        }
        self.until_voters(VOTERS).map(drop)
    }

    fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        let began_ns = self.now_ns();
        let mut hit = Vec::new();
        let mut running = self.arena.expected();
        let leader = self.leader();
        for fault in &step.faults {
            let of = self.whom(*fault, leader, &running)?;
            hit.push((*fault, of));
            running.retain(|number| *number != of);
        }
        for (fault, of) in &hit {
            self.inflict(*fault, *of, hit.len() == 1)?;
        }
        let full = match hit[..] {
            [(Fault::FullDisk(_), of)] => Some(of),
            _ => None,
        };
        if full.is_some() {
            // The others go on without it.
            self.until_written()?;
        }
        std::thread::sleep(step.lasts);
        let ended_ns = self.now_ns();
        for (fault, of) in hit.iter().rev() {
            self.heal(*fault, *of)?;
        }
        let names: Vec<_> = hit
            .iter()
            .map(|(fault, of)| format!("{fault} on {}", self.arena.name(*of)))
            .collect();
        let healed_ns = self.until_written()?;
        self.faults.push(FaultSeen {
            what: names.join(" and "),
            began_ns,
            ended_ns,
            healed_ns,
        });
        if let Some(of) = full {
            self.until_not_told(of)?;
        }
        self.complain_of_the_dead()?;
        std::thread::sleep(step.pause);
        Ok(())
    }

    /// Waits until a client's write that was asked after now has gone through.
    fn until_written(&self) -> anyhow::Result<u64> {
        let (from, after_ns) = (self.recorder.events().len(), self.now_ns());
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let written = self
                .recorder
                .events()
                .into_iter()
                .skip(from)
                .find(|event| event.kind == Ended::Ok && !event.operation.is_read());
            if let Some(written) = written {
                return Ok(written.time.max(after_ns));
            }
            if Instant::now() > deadline {
                bail!("nothing was written within {HEALED_WITHIN:?} after the fault was over");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Who leads, if anybody does.
    fn leader(&self) -> Option<usize> {
        let members = self.members().ok()?;
        let leader = members.into_iter().find(|member| member.leader)?;
        self.arena.at(&leader.address)
    }

    /// The node that a fault hits.
    fn whom(
        &mut self,
        fault: Fault,
        leader: Option<usize>,
        running: &[usize],
    ) -> anyhow::Result<usize> {
        let leads = match fault {
            Fault::Alone(whom)
            | Fault::Deaf(whom)
            | Fault::Mute(whom)
            | Fault::Unreached(whom)
            | Fault::Kill(whom)
            | Fault::Stop(whom)
            | Fault::FullDisk(whom) => whom == Whom::Leader,
            Fault::Bridge => true,
            Fault::KillAll | Fault::FiveVoters | Fault::Replace => false,
        };
        let fitting: Vec<usize> = running
            .iter()
            .copied()
            .filter(|number| (Some(*number) == leader) == leads)
            .collect();
        // Nobody may lead at the moment, or the leader was hit already: then any other will do.
        let among = if fitting.is_empty() {
            running
        } else {
            &fitting
        };
        ensure!(!among.is_empty(), "nobody runs");
        Ok(among[self.rng.random_range(0..among.len())])
    }

    fn inflict(&mut self, fault: Fault, of: usize, alone: bool) -> anyhow::Result<()> {
        let others: Vec<usize> = self
            .arena
            .expected()
            .into_iter()
            .filter(|number| *number != of)
            .collect();
        match fault {
            cut if cut.is_cut() => self.arena.cut(cut, of, &others),
            Fault::Kill(_) => self.arena.kill(of),
            Fault::KillAll => {
                for number in others.into_iter().chain([of]) {
                    self.arena.kill(number)?;
                }
                Ok(())
            }
            Fault::Stop(_) => {
                self.arena.pause(of);
                Ok(())
            }
            Fault::FullDisk(_) => self.fill(of, alone),
            Fault::FiveVoters => self.grow(),
            Fault::Replace => self.replace(of),
            _ => Ok(()),
        }
    }

    fn heal(&mut self, fault: Fault, of: usize) -> anyhow::Result<()> {
        match fault {
            cut if cut.is_cut() => self.arena.reconnect(),
            Fault::Kill(_) => self.arena.serve(of),
            Fault::KillAll => {
                (0..VOTERS).try_for_each(|number| match self.arena.expected().contains(&number) {
                    true => Ok(()),
                    false => self.arena.serve(number),
                })
            }
            Fault::Stop(_) => {
                self.arena.resume(of);
                Ok(())
            }
            // It goes on by itself.
            Fault::FullDisk(_) => self.arena.free(of),
            Fault::FiveVoters => self.shrink(),
            _ => Ok(()),
        }
    }

    /// Two more nodes join and become voters.
    fn grow(&mut self) -> anyhow::Result<()> {
        for number in VOTERS..NODES_MAX {
            let token = self.token()?;
            self.arena.join(number, &token)?;
        }
        self.until_voters(NODES_MAX).map(drop)
    }

    /// They leave: one while it runs, one that was stopped before; a leader has to be stopped first.
    fn shrink(&mut self) -> anyhow::Result<()> {
        for number in VOTERS..NODES_MAX {
            let leads = self
                .members()?
                .iter()
                .any(|member| member.leader && self.arena.at(&member.address) == Some(number));
            if leads || number == NODES_MAX - 1 {
                self.arena.stop(&[number])?;
            }
            self.remove(number)?;
            self.arena.kill(number)?;
            self.arena.wipe(number)?;
        }
        self.until_voters(VOTERS).map(drop)
    }

    /// A node is gone with its disk: it is removed, and another one takes its name.
    fn replace(&mut self, of: usize) -> anyhow::Result<()> {
        let before = self.members()?;
        self.arena.kill(of)?;
        self.arena.wipe(of)?;
        self.remove(of)?;
        let token = self.token()?;
        self.arena.join(of, &token)?;
        let known = self.ids.clone();
        let members = self.until_voters(VOTERS)?;
        let (name, own) = (self.arena.name(of).to_owned(), self.arena.address(of));
        let new = members.iter().find(|member| member.address == own);
        let old = before.iter().find(|member| member.address == own);
        let (new, old) = (
            new.context("it is no member")?.id.0,
            old.context("it was no member")?.id.0,
        );
        if known.contains(&new) || new <= old {
            self.trouble.push(format!(
                "{name} came back as {new}, which was used before ({known:?})"
            ));
        }
        Ok(())
    }

    /// Through the binary, as a person would; a change of leader in between is asked again.
    fn remove(&mut self, number: usize) -> anyhow::Result<()> {
        let name = self.arena.name(number).to_owned();
        self.insist_on(&["metad", "remove", &name, "--apply"], "no metad is named")
            .map(drop)
    }

    fn token(&self) -> anyhow::Result<String> {
        let said = self.insist_on(&["token", "create", "--role", "metad"], "\0")?;
        let found = said
            .split_whitespace()
            .find(|word| word.starts_with("qsfs1-"));
        Ok(found.context("no token was printed")?.to_owned())
    }

    /// Runs a command until it succeeds, or fails with what means that an earlier try had.
    fn insist_on(&self, arguments: &[&str], done_before: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let (code, said) = self.arena.qsfs(arguments)?;
            if code == 0 || said.contains(done_before) {
                return Ok(said);
            }
            if Instant::now() > deadline {
                bail!("qsfs {} ended with {code}: {said}", arguments.join(" "));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn end(mut self, workload: &Workload) -> anyhow::Result<Report> {
        let mut end = self.settled_state(workload)?;
        end.nodes = self.hashes()?;
        self.arena.save_logs(&self.options.out)?;
        let events = self.recorder.finish()?;
        let write = |name: &str, text: String| fs::write(self.options.out.join(name), text);
        write("final.json", serde_json::to_string_pretty(&end)?)?;
        write("faults.json", serde_json::to_string_pretty(&self.faults)?)?;
        let terms = Terms {
            lease_ttl_ns: Some(u64::try_from(LEASE_TTL.as_nanos())?),
        };
        let checked = check_all(&events, &end, terms);
        if exactly_once::repeated(&events).is_ok_and(|repeated| repeated == 0) {
            let text =
                "no request was answered twice: whether requests are done once was not judged";
            self.trouble.push(text.to_owned());
        }
        let report = Report::new(
            self.options.seed,
            &events,
            self.faults,
            checked,
            self.trouble,
        );
        write("report.txt", report.to_string())?;
        Ok(report)
    }

    /// The end, once what metad counts agrees with the records it lists: the leader counts right behind what it applies. Where
    /// it never does, the checker says so.
    fn settled_state(&self, workload: &Workload) -> anyhow::Result<FinalState> {
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let end = self.final_state(workload)?;
            match placement::is_counted(&end) {
                Ok(false) if Instant::now() < deadline => std::thread::sleep(SETTLE),
                // What else is wrong is judged as it was found.
                _ => return Ok(end),
            }
        }
    }

    fn final_state(&self, workload: &Workload) -> anyhow::Result<FinalState> {
        self.runtime.block_on(async {
            let mut end = FinalState::default();
            for backend in self.admin.backends().await? {
                end.backends.push(BackendSite {
                    backend: backend.id,
                    location: backend.location,
                    node: backend.node,
                });
            }
            let status = self.admin.status().await?;
            let keys = workload.volumes();
            for volume in self.admin.volumes().await? {
                let mut records = Vec::new();
                let mut after = DatafileId(0);
                loop {
                    let page = self.admin.list_records(volume.id, None, after, PAGE_MAX);
                    let page = page.await?;
                    let Some(last) = page.last() else { break };
                    after = last.datafile;
                    records.extend(page);
                }
                let name = volume.name.to_string();
                let known = keys.get(&name) == Some(&volume.id);
                ensure!(known, "a volume nobody made: {volume:?}");
                let counted = status.volumes.iter().find(|found| found.name == name);
                let found = FinalVolume {
                    policy: volume.policy,
                    seen: volume_seen(&volume),
                    records,
                    below_policy: counted.map(|found| found.below_policy),
                };
                end.volumes.insert(name, found);
            }
            Ok(end)
        })
    }

    /// State hashes of all nodes, stopped at the same entry. A node that is stopped later than another may have applied one entry more;
    /// then they are started again.
    fn hashes(&mut self) -> anyhow::Result<Vec<NodeHash>> {
        let running: Vec<usize> = self.arena.expected();
        let mut found = Vec::new();
        for _ in 0..SAME_ENTRY_TRIES {
            self.until_voters(VOTERS)?;
            self.until_applied_alike(&running)?;
            self.arena.stop(&running)?;
            let hashes: Vec<NodeHash> = running
                .iter()
                .map(|number| self.hash_of(*number))
                .collect::<anyhow::Result<_>>()?;
            let alike = hashes.iter().all(|hash| hash.applied == hashes[0].applied);
            found.extend(hashes);
            if alike {
                return Ok(found);
            }
            running
                .iter()
                .try_for_each(|number| self.arena.serve(*number))?;
        }
        bail!("the nodes were never stopped at the same entry: {found:?}");
    }

    /// Asks every node by itself, without consensus, how far it is.
    fn until_applied_alike(&self, numbers: &[usize]) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let mut applied = Vec::new();
            for number in numbers {
                let own = ClientId::from_bytes([0xae; ClientId::LEN]);
                let endpoint = vec![self.arena.address(*number)];
                let client = MetadClient::new(endpoint, self.context.identity(), own)?.stale();
                self.runtime.block_on(client.settings())?;
                applied.push(client.applied());
            }
            if applied.iter().all(|index| *index == applied[0]) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "never applied alike: {applied:?}"
            );
        }
    }

    /// By `qsfs metad inspect` of the stopped node.
    fn hash_of(&self, number: usize) -> anyhow::Result<NodeHash> {
        let data = self.arena.data(number);
        let data = data.to_string_lossy();
        let (code, said) = self.arena.qsfs(&["metad", "inspect", "--data", &data])?;
        ensure!(code == 0, "inspect failed: {said}");
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix("state hash"));
        let line = line.with_context(|| format!("no state hash in:\n{said}"))?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [hash, "after", "entry", applied] = words[..] else {
            bail!("not a state hash: {line}");
        };
        Ok(NodeHash {
            node: self.arena.name(number).to_owned(),
            applied: applied.parse()?,
            hash: hash.to_owned(),
        })
    }
}

/// The first process of a process namespace is deaf to signals that it does not handle.
async fn die_when_told() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    std::process::exit(130);
}

/// What a file of a run is called, for whoever reads it again.
pub fn history_file(out: &Path) -> PathBuf {
    out.join("history.jsonl")
}
