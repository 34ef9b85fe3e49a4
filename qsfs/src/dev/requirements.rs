//! What a machine needs, said with the package that brings it.

use anyhow::bail;
use std::fs::File;
use std::io::ErrorKind;

/// Refuses with the name of the package when something is missing.
pub(crate) fn check() -> anyhow::Result<()> {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "/dev/fuse is missing: load the kernel module (`modprobe fuse`); in a container, start it with `--device /dev/fuse --cap-add SYS_ADMIN`"
        ),
        Err(error) => bail!(
            "/dev/fuse cannot be opened: {error}; it should be readable and writable for all (`chmod 666 /dev/fuse`)"
        ),
    }
    let root = nix::unistd::geteuid().is_root();
    if !root && !in_path("fusermount3") {
        bail!(
            "fusermount3 is missing, without which only root can mount: install the package fuse3"
        );
    }
    Ok(())
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
