//! Single flight: those who want the same thing at the same time share one fetch.
//!
//! The fetch runs as a task of its own: it ends, and fills the cache, even when the first who asked goes away.

use futures::future::{BoxFuture, FutureExt, Shared};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

type Flight<V> = Shared<BoxFuture<'static, V>>;

/// See the module.
#[derive(Debug)]
pub struct Flights<K, V> {
    running: Arc<Mutex<HashMap<K, Flight<V>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            running: Arc::default(),
        }
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the flight for `key`, or starts one. `lost` is the answer if the task panicked.
    pub fn join<F, S>(
        &self,
        key: &K,
        lost: V,
        start: S,
    ) -> impl Future<Output = V> + Send + use<F, K, V, S>
    where
        S: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let mut running = self.running.lock();
        if let Some(flight) = running.get(key) {
            return flight.clone();
        }
        let work = start();
        let (table, own) = (Arc::clone(&self.running), key.clone());
        let task = tokio::spawn(async move {
            let landing = Landing { table, key: own };
            let value = work.await;
            drop(landing);
            value
        });
        let flight = async move { task.await.unwrap_or(lost) }.boxed().shared();
        running.insert(key.clone(), flight.clone());
        flight
    }

    /// Flights in the air.
    pub fn len(&self) -> usize {
        self.running.lock().len()
    }

    /// None in the air?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes the flight off the table, also when its task panics or is dropped.
struct Landing<K: Eq + Hash, V> {
    table: Arc<Mutex<HashMap<K, Flight<V>>>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        self.table.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn many_who_ask_at_once_share_one_fetch_and_a_panic_is_no_deadlock() {
        let flights: Flights<u8, Option<u32>> = Flights::default();
        let starts = Arc::new(AtomicUsize::new(0));
        let asked = (0..50).map(|_| {
            let starts = Arc::clone(&starts);
            flights.join(&1, None, move || async move {
                starts.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Some(7)
            })
        });
        let asked: Vec<_> = asked.collect();
        assert!(
            futures::future::join_all(asked)
                .await
                .iter()
                .all(|value| *value == Some(7))
        );
        assert_eq!(starts.load(Ordering::Relaxed), 1);
        assert!(flights.is_empty());
        let lost = flights
            .join(&2, None, || async { panic!("on purpose") })
            .await;
        assert_eq!((lost, flights.len()), (None, 0));
    }
}
