//! How long nobody can commit after the leader was killed.

use crate::cluster::Cluster;
use crate::percentile;
use anyhow::Result;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Commits go on around each kill for so long.
const AROUND: Duration = Duration::from_millis(200);

/// Kills the leader again and again under one caller; prints the longest wait of each.
pub(crate) async fn run(cluster: &mut Cluster, kills: usize) -> Result<()> {
    let mut gaps = Vec::new();
    for _ in 0..kills {
        let answered = Arc::new(Mutex::new(vec![Instant::now()]));
        let stop = Arc::new(AtomicBool::new(false));
        let caller = tokio::spawn({
            let (client, committer) = (cluster.client(1)?, cluster.committer());
            let (answered, stop) = (Arc::clone(&answered), Arc::clone(&stop));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    if client.mutate(committer.mutation()).await.is_ok() {
                        answered
                            .lock()
                            .expect("no panic holds it")
                            .push(Instant::now());
                    }
                }
            }
        });
        tokio::time::sleep(AROUND).await;
        let dead = cluster.kill_leader().await?;
        let killed = Instant::now();
        let after = |answered: &Mutex<Vec<Instant>>| {
            let answered = answered.lock().expect("no panic holds it");
            answered.last().is_some_and(|last| *last > killed + AROUND)
        };
        while !after(&answered) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.store(true, Ordering::Relaxed);
        caller.await?;
        let answered = answered.lock().expect("no panic holds it").clone();
        let gap = answered.windows(2).map(|pair| pair[1] - pair[0]).max();
        gaps.push(gap.unwrap_or_default().as_secs_f64() * 1e3);
        cluster.restart(dead)?;
        cluster.until_healthy().await?;
    }
    gaps.sort_by(f64::total_cmp);
    println!(
        "no commits after a kill of the leader, {kills} kills: p50 {:.0} ms, p99 {:.0} ms, longest {:.0} ms",
        percentile(&gaps, 50),
        percentile(&gaps, 99),
        gaps.last().copied().unwrap_or(0.0)
    );
    Ok(())
}
