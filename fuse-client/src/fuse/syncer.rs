//! One thread that syncs for everybody who waits: all requests that arrived while one sync ran share the next.

use crate::filesystem::FileSystem;
use crate::fuse::convert::answer;
use fuser::ReplyEmpty;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Hands waiting fsyncs to the thread. The queue is bounded by the processes that wait in fsync. The thread ends when
/// this is dropped.
pub(super) struct Syncer {
    queue: Sender<ReplyEmpty>,
}

impl Syncer {
    pub(super) fn start(filesystem: Arc<FileSystem>) -> std::io::Result<Self> {
        let (queue, requests) = channel();
        std::thread::Builder::new()
            .name("fsync".into())
            .spawn(move || run(&filesystem, &requests))?;
        Ok(Self { queue })
    }

    pub(super) fn sync(&self, reply: ReplyEmpty) {
        if let Err(unsent) = self.queue.send(reply) {
            unsent.0.error(fuser::Errno::EIO);
        }
    }
}

fn run(filesystem: &FileSystem, requests: &Receiver<ReplyEmpty>) {
    while let Ok(first) = requests.recv() {
        let waiting: Vec<ReplyEmpty> = std::iter::once(first).chain(requests.try_iter()).collect();
        match filesystem.sync() {
            Ok(()) => waiting.into_iter().for_each(ReplyEmpty::ok),
            Err(error) => {
                let errno = answer("fsync", &error);
                for reply in waiting {
                    reply.error(errno);
                }
            }
        }
    }
}
