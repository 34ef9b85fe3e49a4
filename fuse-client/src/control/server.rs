//! The answering side, in the mount.

use super::{Answer, Line, Progress, Request, short_path};
use async_trait::async_trait;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Longest request.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Requests served at once.
const CONNECTIONS_MAX: usize = 32;
/// Progress lines waiting to be written; more are left out.
const PROGRESS_MAX: usize = 16;

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// As in [`Line::Error`].
    pub code: &'static str,
    /// For people.
    pub text: String,
    /// Exit code.
    pub exit_code: u8,
}

/// What answers.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Progress that cannot be written right now is left out.
    async fn handle(
        &self,
        request: Request,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Answer, Refusal>;
}

/// Binds the socket; a stale one of a killed mount is replaced (the state directory is locked).
pub fn bind(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_dir, short) = short_path(path)?;
    let listener = UnixListener::bind(&short)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until cancelled.
pub async fn serve(
    listener: UnixListener,
    handler: Arc<dyn Handler>,
    cancelled: CancellationToken,
) {
    let free = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = cancelled.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(permit) = Arc::clone(&free).acquire_owned().await else {
                    return;
                };
                let handler = Arc::clone(&handler);
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, handler).await {
                        tracing::debug!(%error, "a command went away");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(stream: UnixStream, handler: Arc<dyn Handler>) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut text = Vec::new();
    BufReader::new(read)
        .take(REQUEST_BYTES_MAX)
        .read_until(b'\n', &mut text)
        .await?;
    let (sender, mut progress) = mpsc::channel(PROGRESS_MAX);
    let request = serde_json::from_slice::<Request>(&text);
    let handling = async move {
        match request {
            Ok(request) => handler.handle(request, sender).await,
            Err(error) => Err(Refusal {
                code: "INVALID",
                text: format!("not a request: {error}"),
                exit_code: 2,
            }),
        }
    };
    tokio::pin!(handling);
    let last = loop {
        tokio::select! {
            biased;
            Some(step) = progress.recv() => write_line(&mut write, &Line::Progress(step)).await?,
            outcome = &mut handling => break outcome,
        }
    };
    while let Ok(step) = progress.try_recv() {
        write_line(&mut write, &Line::Progress(step)).await?;
    }
    let line = match last {
        Ok(answer) => Line::Done { answer },
        Err(Refusal {
            code,
            text,
            exit_code,
        }) => Line::Error {
            code: code.to_owned(),
            text,
            exit_code,
        },
    };
    write_line(&mut write, &line).await
}

async fn write_line(write: &mut (impl AsyncWriteExt + Unpin), line: &Line) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    write.write_all(&text).await
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::control::{Client, ControlError, Synced};

    struct Echo;

    #[async_trait]
    impl Handler for Echo {
        async fn handle(
            &self,
            request: Request,
            progress: mpsc::Sender<Progress>,
        ) -> Result<Answer, Refusal> {
            match request {
                Request::Sync { .. } => {
                    progress
                        .send(Progress {
                            done_bytes: 1,
                            total_bytes: 2,
                            ..Progress::default()
                        })
                        .await
                        .unwrap();
                    Ok(Answer::Synced(Synced::default()))
                }
                _ => Err(Refusal {
                    code: "POLICY",
                    text: "below policy".to_owned(),
                    exit_code: 15,
                }),
            }
        }
    }

    #[tokio::test]
    async fn requests_are_answered_with_progress_over_a_long_path() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("control.sock");
        let cancelled = CancellationToken::new();
        let server = tokio::spawn(serve(
            bind(&path).unwrap(),
            Arc::new(Echo),
            cancelled.clone(),
        ));
        let client = Client::new(&path);
        let mut steps = Vec::new();
        let sync = Request::Sync {
            timeout_ms: None,
            allow_degraded: false,
        };
        let answer = client
            .ask(&sync, |step| steps.push(step.done_bytes))
            .await
            .unwrap();
        assert_eq!(
            (answer, steps),
            (Answer::Synced(Synced::default()), vec![1])
        );
        let refused = client.ask(&Request::Evict, |_| {}).await.unwrap_err();
        assert!(
            matches!(&refused, ControlError::Refused { code, exit_code: 15, .. } if code == "POLICY")
        );
        cancelled.cancel();
        server.await.unwrap();
    }
}
