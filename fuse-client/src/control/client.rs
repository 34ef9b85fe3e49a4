//! The asking side, for commands.

use super::{Answer, LINE_BYTES_MAX, Line, Progress, Request, short_path};
use crate::filesystem::CONTROL_XATTR;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Why a mount could not be asked, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not a mount.
    #[error("{} is not inside a mounted QSFS volume", .0.display())]
    NotMounted(PathBuf),
    /// The socket does not answer.
    #[error("the mount does not answer on {}: {reason}", path.display())]
    Unreachable {
        /// Socket.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// The answer makes no sense.
    #[error("the mount answered something this program does not understand: {0}")]
    Answer(String),
    /// Refused.
    #[error("{text}")]
    Refused {
        /// As in [`Line::Error`].
        code: String,
        /// For people.
        text: String,
        /// Exit code.
        exit_code: u8,
    },
}

impl ControlError {
    /// The exit code of product.md.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Refused { exit_code, .. } => *exit_code,
            _ => 1,
        }
    }
}

/// A mount found from one of its directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Root of the mount.
    pub root: PathBuf,
    /// Its control socket.
    pub socket: PathBuf,
    /// The given path, below the root.
    pub below: PathBuf,
}

/// Finds the mount that a path is in.
pub fn find(path: &Path) -> Result<Found, ControlError> {
    let not_mounted = || ControlError::NotMounted(path.to_owned());
    let real = path.canonicalize().map_err(|_| not_mounted())?;
    for root in real.ancestors() {
        if let Some(socket) = control_xattr(root) {
            let below = real.strip_prefix(root).unwrap_or(Path::new("")).to_owned();
            return Ok(Found {
                root: root.to_owned(),
                socket,
                below,
            });
        }
    }
    Err(not_mounted())
}

#[expect(unsafe_code, reason = "neither std nor nix has getxattr")]
fn control_xattr(dir: &Path) -> Option<PathBuf> {
    let path = CString::new(dir.as_os_str().as_bytes()).ok()?;
    let name = CString::new(CONTROL_XATTR).ok()?;
    let mut value = vec![0_u8; 4096];
    // SAFETY: both strings end with NUL and outlive the call; the buffer is as long as said.
    let bytes = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(bytes).ok()?);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&value)))
}

/// A mount that can be asked.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The mount behind a socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The mount that a path is in.
    pub fn find(path: &Path) -> Result<Self, ControlError> {
        Ok(Self::new(find(path)?.socket))
    }

    /// Asks; `progress` is called for every sign of life.
    pub async fn ask(
        &self,
        request: &Request,
        mut progress: impl FnMut(Progress),
    ) -> Result<Answer, ControlError> {
        let unreachable = |reason| ControlError::Unreachable {
            path: self.socket.clone(),
            reason,
        };
        let (_dir, short) = short_path(&self.socket).map_err(unreachable)?;
        let mut stream = UnixStream::connect(&short).await.map_err(unreachable)?;
        let mut line =
            serde_json::to_vec(request).map_err(|error| ControlError::Answer(error.to_string()))?;
        line.push(b'\n');
        stream.write_all(&line).await.map_err(unreachable)?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut text = Vec::new();
            let limit = LINE_BYTES_MAX as u64;
            (&mut reader)
                .take(limit)
                .read_until(b'\n', &mut text)
                .await
                .map_err(unreachable)?;
            if text.is_empty() {
                return Err(unreachable(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let line = serde_json::from_slice(&text)
                .map_err(|error| ControlError::Answer(error.to_string()))?;
            match line {
                Line::Progress(step) => progress(step),
                Line::Done { answer } => return Ok(answer),
                Line::Error {
                    code,
                    text,
                    exit_code,
                } => {
                    return Err(ControlError::Refused {
                        code,
                        text,
                        exit_code,
                    });
                }
            }
        }
    }
}
