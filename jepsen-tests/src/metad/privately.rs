//! Runs a part of a program where nothing it makes is seen by others or outlives it: a process, mount and network namespace of its own.
//!
//! The first process of a process namespace takes all others with it, and they their namespaces, mounts and addresses. It dies
//! itself with whoever began it: by `--kill-child` with `unshare`, and `unshare` by the parent-death signal that `setpriv` sets.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Tools that are needed, with the Debian package of each.
const TOOLS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("mount", "mount"),
    ("timeout", "coreutils"),
];

/// Why it cannot be done here, if it cannot.
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces and mounts need root".into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|(tool, _)| !found(tool))
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    if !missing.is_empty() {
        return Some(format!("missing: {}", missing.join(", ")));
    }
    let tried = command(Path::new("true"))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string());
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error),
    }
}

/// A command that runs `program` as the first process of namespaces of its own.
fn command(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--net",
        "--pid",
    ]);
    command.args(["--fork", "--kill-child", "--mount-proc", "--"]);
    command.arg(program);
    command
}

/// Starts it. Kill it, or end, and everything is gone.
pub fn start(program: &Path, arguments: &[String]) -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let mut command = command(program);
    // Ctrl-C is for us: we kill it, and then remove what is left.
    command
        .args(arguments)
        .stdin(Stdio::null())
        .process_group(0);
    command.spawn()
}
