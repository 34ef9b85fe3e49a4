//! Disks of simulated nodes: `SimMedia` below log, vote and snapshots; a twin of the row store; and how long work takes.

use parking_lot::Mutex;
use qsfs_metad::ground::{Job, Store, Stores, Work, WorkLost};
use qsfs_metad::state::kv::{Batch, KvError, Pair, RowKey};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Bytes before what they protect in a page.
const CHECKSUM_BYTES: usize = 4;
/// Between two looks whether a hanging disk goes on.
const HANG_LOOK: Duration = Duration::from_millis(20);

/// How long work on a disk takes; the seed draws every single time.
#[derive(Debug)]
pub struct DiskSpeed {
    state: Mutex<Speed>,
}

#[derive(Debug)]
struct Speed {
    random: StdRng,
    usual_us: u64,
    hangs: bool,
}

/// A healthy disk takes so long on average.
const HEALTHY_US: u64 = 800;

impl DiskSpeed {
    /// A healthy disk.
    pub fn new(seed: u64) -> Self {
        Self {
            state: Mutex::new(Speed {
                random: StdRng::seed_from_u64(seed),
                usual_us: HEALTHY_US,
                hangs: false,
            }),
        }
    }

    /// From now on so slow on average.
    pub fn slow(&self, usual: Duration) {
        self.state.lock().usual_us = usual.as_micros().try_into().unwrap_or(u64::MAX);
    }

    /// Nothing ends until it is healthy again.
    pub fn hang(&self) {
        self.state.lock().hangs = true;
    }

    /// Healthy again.
    pub fn heal(&self) {
        let mut state = self.state.lock();
        (state.usual_us, state.hangs) = (HEALTHY_US, false);
    }

    fn draw(&self) -> Duration {
        let mut state = self.state.lock();
        let usual_us = state.usual_us;
        Duration::from_micros(state.random.random_range(usual_us / 4..=usual_us * 2))
    }
}

/// Work takes its time and is then done at once, on the one thread there is. A crash in between means it was never done.
#[derive(Debug)]
pub struct SimWork(pub Arc<DiskSpeed>);

impl Work for SimWork {
    fn run(&self, job: Job) -> futures::future::BoxFuture<'static, Result<(), WorkLost>> {
        let speed = Arc::clone(&self.0);
        Box::pin(async move {
            tokio::time::sleep(speed.draw()).await;
            while speed.state.lock().hangs {
                tokio::time::sleep(HANG_LOOK).await;
            }
            job();
            Ok(())
        })
    }

    fn has_threads(&self) -> bool {
        false
    }
}

type Rows = BTreeMap<RowKey, Vec<u8>>;

fn put(rows: &mut Rows, batch: &Batch) {
    for (key, value) in batch {
        match value {
            Some(value) => rows.insert(key.clone(), value.clone()),
            None => rows.remove(key),
        };
    }
}

/// The twin of a row store: a crash takes back a suffix of the batches since the last flush.
#[derive(Debug, Default)]
struct Twin {
    rows: Mutex<TwinRows>,
}

#[derive(Debug, Default, Clone)]
struct TwinRows {
    now: Rows,
    durable: Rows,
    unflushed: Vec<Batch>,
    /// Flushing does nothing: what one of the broken variants does.
    lies: bool,
}

impl Store for Twin {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.rows.lock().now.get(key).cloned())
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        if from >= until {
            return Ok(Vec::new());
        }
        let rows = self.rows.lock();
        let bounds = (Bound::Included(from), Bound::Excluded(until));
        let found = rows.now.range::<[u8], _>(bounds).take(max);
        Ok(found.map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn write(&self, batch: &Batch) -> Result<(), KvError> {
        let mut rows = self.rows.lock();
        put(&mut rows.now, batch);
        rows.unflushed.push(batch.clone());
        Ok(())
    }

    fn flush(&self) -> Result<(), KvError> {
        let mut rows = self.rows.lock();
        if !rows.lies {
            rows.durable = rows.now.clone();
            rows.unflushed.clear();
        }
        Ok(())
    }

    fn verify(&self) -> Result<(), KvError> {
        Ok(())
    }
}

/// All row stores of one node.
#[derive(Debug, Default)]
pub struct SimStores {
    stores: Mutex<BTreeMap<PathBuf, Arc<Twin>>>,
    lies: bool,
}

impl SimStores {
    /// `lies`: flushing does nothing.
    pub fn new(lies: bool) -> Self {
        Self {
            stores: Mutex::default(),
            lies,
        }
    }

    /// Flips a bit of a page of the newest store, if there is one. `unseen`: with a checksum to match. The one page without a checksum
    /// of its own, the number of the format, is left alone: it says what program the rows are for, not what they are.
    pub fn flip(&self, unseen: bool, bit: u8, random: &mut StdRng) -> bool {
        let stores = self.stores.lock();
        let Some((_, twin)) = stores.last_key_value() else {
            return false;
        };
        let mut rows = twin.rows.lock();
        let pages: Vec<_> = rows
            .now
            .keys()
            .filter(|name| name.first() == Some(&b'p'))
            .collect();
        let Some(name) = pages.choose(random).map(|name| (*name).clone()) else {
            return false;
        };
        let mut page = rows.now[&name].clone();
        if page.len() <= CHECKSUM_BYTES {
            return false;
        }
        let at = random.random_range(CHECKSUM_BYTES..page.len());
        page[at] ^= bit;
        if unseen {
            let forged = crc32fast::hash(&page[CHECKSUM_BYTES..]);
            page[..CHECKSUM_BYTES].copy_from_slice(&forged.to_le_bytes());
        }
        if let Some(durable) = rows.durable.get_mut(&name) {
            *durable = page.clone();
        }
        rows.now.insert(name, page);
        true
    }

    /// What the machine finds after losing power.
    pub fn after_power_loss(&self, random: &mut StdRng) -> Self {
        let stores = self.stores.lock();
        let crashed = stores.iter().map(|(path, twin)| {
            let old = twin.rows.lock().clone();
            let mut durable = old.durable;
            let kept = if self.lies {
                0
            } else {
                random.random_range(0..=old.unflushed.len())
            };
            for batch in &old.unflushed[..kept] {
                put(&mut durable, batch);
            }
            let rows = TwinRows {
                now: durable.clone(),
                durable,
                unflushed: Vec::new(),
                lies: self.lies,
            };
            let rows = Mutex::new(rows);
            (path.clone(), Arc::new(Twin { rows }))
        });
        Self {
            stores: Mutex::new(crashed.collect()),
            lies: self.lies,
        }
    }
}

impl Stores for SimStores {
    fn open(&self, dir: &Path) -> Result<Arc<dyn Store>, KvError> {
        let mut stores = self.stores.lock();
        let lies = self.lies;
        let twin = stores.entry(dir.to_owned()).or_insert_with(|| {
            let rows = TwinRows {
                lies,
                ..TwinRows::default()
            };
            Arc::new(Twin {
                rows: Mutex::new(rows),
            })
        });
        Ok(Arc::clone(twin) as Arc<dyn Store>)
    }

    fn exists(&self, dir: &Path) -> bool {
        self.stores.lock().contains_key(dir)
    }

    fn remove(&self, dir: &Path) -> io::Result<()> {
        self.stores.lock().remove(dir);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut stores = self.stores.lock();
        let moved = stores.remove(from).ok_or(io::ErrorKind::NotFound)?;
        stores.insert(to.to_owned(), moved);
        Ok(())
    }

    fn list(&self, parent: &Path) -> io::Result<Vec<String>> {
        let stores = self.stores.lock();
        let inside = stores.keys().filter(|path| path.parent() == Some(parent));
        let names = inside.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
        Ok(names.collect())
    }
}
