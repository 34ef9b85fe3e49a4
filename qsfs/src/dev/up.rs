//! Starting: a new cluster step by step, or everything that a kept directory holds.

use super::layout::{Kind, Layout, Member, VOLUME};
use super::process::{Process, is_ours, read_pid};
use super::{UpArguments, requirements, table, take_down};
use crate::daemon::Started;
use crate::session::Session;
use crate::signals::Endings;
use crate::table::print;
use crate::volume::{self, NewVolume};
use anyhow::{Context as _, bail};
use qsfs_proto::api::{Backend, Role, Verdict, VolumeSettings};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// For every step of a start, on a loaded machine.
const STEP_PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at what metad says.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Tokens are used at once.
const TOKEN_TTL: Duration = Duration::from_secs(300);

/// Children that this process started, by name.
type Children = Vec<(String, Child)>;

/// `qsfs dev up`: start, tell, wait for the end, take down.
pub(super) async fn run(arguments: UpArguments) -> anyhow::Result<()> {
    requirements::check()?;
    let dir = arguments
        .dir
        .as_deref()
        .context("name the directory to mount at")?;
    let made_mount = make_mount_point(dir)?;
    let mount = qsfs_fuse_client::fuse::check_mount_point(dir)?.path;
    let mut endings = Endings::listen()?;
    let (dir, temporary) = data_directory(&arguments)?;
    let mut layout = open_layout(&dir, &mount, &arguments)?;
    let _foreground = Foreground::take(layout.dir())?;
    let mut children = Children::new();
    let started = tokio::select! {
        started = start_all(&mut layout, &mut children) => started,
        () = endings.next() => Err(anyhow::anyhow!("interrupted")),
    };
    let outcome = match started {
        Ok(()) => {
            tell(&layout)?;
            watch(&layout, children, &mut endings).await;
            tokio::select! {
                ended = take_down::all(&layout, arguments.no_push) => ended,
                () = endings.next() => take_down::all(&layout, true).await,
            }
        }
        Err(error) => {
            // Nothing can be at risk in a cluster that never stood.
            let _ = take_down::all(&layout, true).await;
            Err(error)
        }
    };
    if temporary && !arguments.keep {
        std::fs::remove_dir_all(layout.dir())
            .with_context(|| format!("removing {}", layout.dir().display()))?;
    }
    if made_mount {
        let _ = std::fs::remove_dir(&mount);
    }
    outcome
}

fn make_mount_point(dir: &Path) -> anyhow::Result<bool> {
    // A dead mount answers no stat; only what is really absent is made.
    match std::fs::symlink_metadata(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Where to keep everything, and whether that is ours to remove.
fn data_directory(arguments: &UpArguments) -> anyhow::Result<(PathBuf, bool)> {
    if let Some(dir) = &arguments.data_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        return Ok((dir.canonicalize()?, false));
    }
    let dir = tempfile::Builder::new().prefix("qsfs-dev-").tempdir()?;
    Ok((dir.keep().canonicalize()?, true))
}

fn open_layout(dir: &Path, mount: &Path, arguments: &UpArguments) -> anyhow::Result<Layout> {
    if !Layout::exists(dir) {
        if std::fs::read_dir(dir)?.next().is_some() {
            bail!(
                "{} is not empty and holds no dev cluster; use an empty directory",
                dir.display()
            );
        }
        return Layout::create(dir, mount, arguments.options.clone());
    }
    let mut layout = Layout::load(dir)?;
    if !layout.is_complete() {
        bail!(
            "the cluster in {} was never completed; remove that directory",
            dir.display()
        );
    }
    if layout.options() != &arguments.options {
        tracing::warn!(
            "{} keeps the options it was made with; those given now are not used",
            dir.display()
        );
    }
    layout.move_mount(mount)?;
    Ok(layout)
}

/// `D/pid`: the foreground process, so that `dev down` finds it and nobody starts a second one.
struct Foreground(PathBuf);

impl Foreground {
    fn take(dir: &Path) -> anyhow::Result<Self> {
        if let Some(pid) = foreground_pid(dir) {
            bail!("the cluster in {} runs already (pid {pid})", dir.display());
        }
        let file = dir.join("pid");
        std::fs::write(&file, format!("{}\n", std::process::id()))?;
        Ok(Self(file))
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The living foreground process of a dev directory. Its command line need not name the directory, so its binary counts.
pub(super) fn foreground_pid(dir: &Path) -> Option<i32> {
    let pid = read_pid(&dir.join("pid"))?;
    let binary = |of: &str| std::fs::read_link(format!("/proc/{of}/exe")).ok();
    let same = binary(&pid.to_string())? == binary("self")?;
    let me = std::process::id().cast_signed();
    (pid != me && same && is_ours(pid, Path::new("dev"))).then_some(pid)
}

async fn start_all(layout: &mut Layout, children: &mut Children) -> anyhow::Result<()> {
    if layout.is_complete() {
        for kind in [Kind::Metad, Kind::Agent] {
            for member in layout.of_kind(kind) {
                if let Some(child) = spawn_again(layout, member)? {
                    children.push((member.name.clone(), child));
                }
            }
        }
        let session = Session::open(Some(&layout.cluster_file()))?;
        wait_backends(layout, &session, children).await?;
    } else {
        let session = start_new(layout, children).await?;
        create_volume(layout, &session).await?;
        layout.set_complete()?;
    }
    let mount = layout
        .of_kind(Kind::Mount)
        .next()
        .context("a plan has a mount")?;
    let child = start_mount(layout, mount).await?;
    children.push((mount.name.clone(), child));
    Ok(())
}

async fn start_new(layout: &Layout, children: &mut Children) -> anyhow::Result<Session> {
    let metads: Vec<&Member> = layout.of_kind(Kind::Metad).collect();
    let (first, others) = metads.split_first().context("a plan has metad nodes")?;
    children.push((first.name.clone(), bootstrap(layout, first).await?));
    let session = Session::open(Some(&layout.cluster_file()))?;
    for (number, member) in others.iter().enumerate() {
        let child = join(layout, member, &session).await?;
        children.push((member.name.clone(), child));
        let what = format!("{} to become a voter", member.name);
        until(layout, children, &what, || async {
            let members = session.members().await?;
            let voters = members.iter().filter(|member| member.voter).count();
            Ok((voters >= number + 2).then_some(()))
        })
        .await?;
    }
    // After the metad nodes, so that every agent knows all three from its token on.
    for member in layout.of_kind(Kind::Agent) {
        let child = join(layout, member, &session).await?;
        children.push((member.name.clone(), child));
    }
    wait_backends(layout, &session, children).await?;
    // Also keeps their addresses in the cluster file, for when the first one is dead.
    session.members().await?;
    Ok(session)
}

async fn wait_backends(
    layout: &Layout,
    session: &Session,
    children: &mut Children,
) -> anyhow::Result<()> {
    let wanted: u32 = layout.members().iter().map(|member| member.backends).sum();
    until(layout, children, "all backends to be up", || async {
        let backends = session.client().backends().await?;
        // One that was lost for good is not waited for.
        let settled = |backend: &Backend| {
            backend.verdict != Verdict::Suspect && backend.verdict != Verdict::Down
        };
        let settled = backends.iter().filter(|backend| settled(backend));
        Ok((settled.count() >= wanted as usize).then_some(()))
    })
    .await
}

/// Looks until there is something; gives up when a child ends or patience does.
async fn until<T, F>(
    layout: &Layout,
    children: &mut Children,
    what: &str,
    mut look: impl FnMut() -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<Option<T>>>,
{
    let deadline = Instant::now() + STEP_PATIENCE;
    loop {
        let problem = match look().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => "not yet".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        for (name, child) in children.iter_mut() {
            if let Some(status) = child.try_wait()? {
                let member = layout.members().iter().find(|member| member.name == *name);
                let log = member.map(|member| Process::of(layout, member).log_tail());
                bail!("{name} ended with {status}:\n{}", log.unwrap_or_default());
            }
        }
        if Instant::now() >= deadline {
            bail!(
                "waited {} s for {what}: {problem}; logs are in {}",
                STEP_PATIENCE.as_secs(),
                layout.dir().display()
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn qsfs(layout: &Layout) -> anyhow::Result<Command> {
    let binary = std::env::current_exe().context("finding our own binary")?;
    let mut command = Command::new(binary);
    command
        .arg("--cluster")
        .arg(layout.cluster_file())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Ok(command)
}

async fn bootstrap(layout: &Layout, member: &Member) -> anyhow::Result<Child> {
    let process = Process::of(layout, member);
    let options = layout.options();
    let mut command = qsfs(layout)?;
    command
        .args(["metad", "bootstrap", "--name", &member.name])
        .args(["--location", &member.location, "--listen", &member.address])
        .arg("--data")
        .arg(process.data())
        .stdout(Stdio::piped());
    for (flag, duration) in [
        ("--heartbeat", options.heartbeat),
        ("--down-after", options.down_after),
        ("--lost-after", options.lost_after),
        ("--scrub-interval", options.scrub_interval),
        ("--tombstone-grace", options.tombstone_grace),
        ("--lease-ttl", options.lease_ttl),
    ] {
        command.arg(flag).arg(format!("{}ms", duration.as_millis()));
    }
    let mut child = process.spawn(command)?;
    let output = child.stdout.take().context("its output is piped")?;
    let mut lines = BufReader::new(output).lines();
    loop {
        match lines.next_line().await? {
            Some(line) if line.starts_with(crate::metad::CLUSTER_FILE_LABEL) => return Ok(child),
            Some(_) => {}
            None => {
                let status = child.wait().await?;
                bail!(
                    "{} ended with {status}:\n{}",
                    member.name,
                    process.log_tail()
                );
            }
        }
    }
}

/// Joins a metad node or an agent; its token goes through a pipe, not through an argument.
async fn join(layout: &Layout, member: &Member, session: &Session) -> anyhow::Result<Child> {
    let process = Process::of(layout, member);
    let (noun, role) = match member.kind {
        Kind::Agent => ("agent", Role::Agent),
        Kind::Metad | Kind::Mount => ("metad", Role::Metad),
    };
    let token = crate::token::create(session, role, TOKEN_TTL).await?;
    let mut command = qsfs(layout)?;
    command
        .args([noun, "join", "--token-file", "-", "--name", &member.name])
        .args(["--location", &member.location, "--listen", &member.address])
        .arg("--data")
        .arg(process.data())
        .stdin(Stdio::piped());
    for number in 1..=member.backends {
        let dir = process.data().join(format!("backend-{number}"));
        let mut backend = dir.into_os_string();
        backend.push(format!("={}", layout.options().capacity));
        command.arg("--backend").arg(backend);
    }
    let mut child = process.spawn(command)?;
    let mut input = child.stdin.take().context("its input is piped")?;
    input.write_all(token.as_bytes()).await?;
    drop(input);
    Ok(child)
}

async fn create_volume(layout: &Layout, session: &Session) -> anyhow::Result<()> {
    let options = layout.options();
    let new = NewVolume {
        name: VOLUME.parse()?,
        geometry: Some(options.policy),
        survive: None,
        settings: VolumeSettings {
            push_interval_ms: crate::units::millis(options.push_interval),
            datafile_bytes: options.datafile_size,
            ..VolumeSettings::default()
        },
        kit: layout.kit_file(),
        keep_copy: false,
    };
    volume::create(session, new).await.map(drop)
}

/// Starts a metad node or agent on the data it has; `None` when it runs already.
fn spawn_again(layout: &Layout, member: &Member) -> anyhow::Result<Option<Child>> {
    let process = Process::of(layout, member);
    if process.pid().is_some() {
        return Ok(None);
    }
    let noun = if member.kind == Kind::Agent {
        "agent"
    } else {
        "metad"
    };
    let mut command = qsfs(layout)?;
    command.args([noun, "serve", "--data"]).arg(process.data());
    process.spawn(command).map(Some)
}

async fn start_mount(layout: &Layout, member: &Member) -> anyhow::Result<Child> {
    let process = Process::of(layout, member);
    let mut command = qsfs(layout)?;
    command
        .args(["mount", VOLUME])
        .arg(layout.mount())
        .args(["--foreground", "--report-start", "--state-dir"])
        .arg(process.data())
        .arg("--kit")
        .arg(layout.kit_file())
        .stdout(Stdio::piped());
    if let Some(bytes) = layout.options().cache_limit {
        command.args(["--cache-limit", &bytes.to_string()]);
    }
    let mut child = process.spawn(command)?;
    let output = child.stdout.take().context("its output is piped")?;
    let output = output.into_owned_fd()?;
    let said = tokio::task::spawn_blocking(move || Started::hear(std::fs::File::from(output)));
    match said.await? {
        Started::Ready => Ok(child),
        Started::Failed { error, .. } => {
            let _ = child.wait().await;
            bail!(
                "mounting {VOLUME} at {}: {error}\n{}",
                layout.mount().display(),
                process.log_tail()
            )
        }
    }
}

/// `dev start NAME`.
pub(super) async fn start_again(layout: &Layout, member: &Member) -> anyhow::Result<()> {
    if member.kind != Kind::Mount {
        let mut child = spawn_again(layout, member)?.context("it runs already")?;
        // One that cannot start says so at once: a wrong directory, a taken port.
        let early = tokio::time::timeout(Duration::from_millis(300), child.wait()).await;
        if let Ok(status) = early {
            let process = Process::of(layout, member);
            bail!("it ended with {}:\n{}", status?, process.log_tail());
        }
        return Ok(());
    }
    take_down::detach(layout.mount());
    start_mount(layout, member).await.map(drop)
}

fn tell(layout: &Layout) -> anyhow::Result<()> {
    let binary = std::env::current_exe()?;
    let here = std::env::current_dir().unwrap_or_default();
    let binary = match binary.strip_prefix(&here) {
        Ok(relative) => format!("./{}", relative.display()),
        Err(_) => binary.display().to_string(),
    };
    let (dir, mount) = (layout.dir().display(), layout.mount().display());
    print(&format!(
        "{table}\n\
         volume {VOLUME}, policy {policy}, mounted at {mount}\n\
         data directory: {dir}\n\n\
         Try, in another terminal:\n  \
           export QSFS_CLUSTER={cluster}\n  \
           cp -r /etc/ssl {mount}/ && {binary} sync {mount} && {binary} status\n  \
           {binary} dev kill loc1 --data-dir {dir}; {binary} status      # a location is gone; everything still reads\n  \
           {binary} dev start loc1 --data-dir {dir}; {binary} status --watch      # watch it heal\n\n\
         Ctrl-C ends it.\n",
        table = table(layout).render(),
        policy = layout.options().policy,
        cluster = layout.cluster_file().display(),
    ))
}

/// Until asked to end; says when a process ends that nobody ended.
async fn watch(layout: &Layout, children: Children, endings: &mut Endings) {
    let (ended, mut endeds) = mpsc::channel(children.len().max(1));
    for (name, mut child) in children {
        let ended = ended.clone();
        tokio::spawn(async move {
            let status = child.wait().await;
            // The receiver ends with the foreground.
            let _ = ended.send((name, status)).await;
        });
    }
    drop(ended);
    loop {
        tokio::select! {
            () = endings.next() => return,
            Some((name, status)) = endeds.recv() => {
                let Some(member) = layout.members().iter().find(|member| member.name == name) else { continue };
                let process = Process::of(layout, member);
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                if process.is_wanted() {
                    eprintln!("{name} ended by itself ({status}); its log: {}; start it again: qsfs dev start {name} --data-dir {}", process.log().display(), layout.dir().display());
                } else {
                    eprintln!("{name} was ended ({status})");
                }
            }
        }
    }
}
