//! What runs, by the pid files of a dev directory. A pid is only believed when its command line names the directory.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;

/// Pid in `dir/pid`, if that process lives and its command line names `dir`.
pub fn pid_of(dir: &Path) -> Option<i32> {
    let pid: i32 = fs::read_to_string(dir.join("pid"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    (is_alive(pid) && command_line(pid).contains(dir.to_str()?)).then_some(pid)
}

/// Runs and is no zombie.
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    })
}

/// Sends a signal; a process that is gone already is fine.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Resident bytes now and at the peak.
pub fn resident_bytes(pid: i32) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}

/// Every living process whose command line names `dir`, as `(pid, command line)`.
pub fn all_naming(dir: &Path) -> Vec<(i32, String)> {
    let Some(dir) = dir.to_str() else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let me = std::process::id().cast_signed();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != me && is_alive(*pid))
        .map(|pid| (pid, command_line(pid)))
        .filter(|(_, line)| line.contains(dir))
        .collect()
}

/// Something is mounted exactly at `dir`.
pub fn is_mounted(dir: &Path) -> bool {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
        return false;
    };
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|point| Path::new(&unescape(point)) == dir)
}

/// Takes a mount away whatever it is doing; its users get errors instead of hanging.
pub fn unmount_lazily(dir: &Path) {
    if is_mounted(dir) {
        let _ = nix::mount::umount2(dir, nix::mount::MntFlags::MNT_DETACH);
    }
    if is_mounted(dir) {
        let _ = std::process::Command::new("fusermount3")
            .arg("-uz")
            .arg(dir)
            .status();
    }
}

fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// The kernel writes space, tab, newline and backslash of a mount point as `\ooo`.
fn unescape(field: &str) -> String {
    let mut text = String::new();
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4).unwrap_or_default();
        match u8::from_str_radix(digits, 8) {
            Ok(byte) => {
                text.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            Err(_) => {
                text.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_are_read_as_they_are() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescape("/plain"), "/plain");
    }

    #[test]
    fn a_pid_file_of_a_stranger_is_not_believed() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join("pid"), std::process::id().to_string()).expect("write");
        assert_eq!(pid_of(dir.path()), None);
    }
}
