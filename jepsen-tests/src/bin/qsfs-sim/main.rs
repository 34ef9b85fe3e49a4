//! Runs one seed of the simulation (`qsfs_jepsen_tests::sim`), in this process of its own. Ends with 1 and lines that begin with
//! `VIOLATION` when something is not as it must be.
//!
//! ```text
//! qsfs-sim SEED [--faults partition,crash,…] [--span MS] [--broken VARIANT [--rounds N]] [--trace]
//! ```

mod entropy;

use qsfs_jepsen_tests::sim::broken::Variant;
use qsfs_jepsen_tests::sim::plan::KINDS;
use qsfs_jepsen_tests::sim::{Options, PANICS, run};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Virtual milliseconds of faults, unless told otherwise.
const SPAN_MS: u64 = 12_000;

fn options() -> Result<Options, String> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        seed: 1,
        span_ms: SPAN_MS,
        kinds: KINDS.to_vec(),
        broken: None,
        rounds: 4,
        echo: false,
    };
    let number = |text: Option<String>| -> Result<u64, String> {
        let text = text.ok_or("a number is missing")?;
        text.parse().map_err(|_| format!("{text:?} is no number"))
    };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--trace" => options.echo = true,
            "--span" => options.span_ms = number(arguments.next())?,
            "--rounds" => options.rounds = number(arguments.next())?,
            "--faults" => {
                let wanted = arguments.next().unwrap_or_default();
                let known = |name: &str| KINDS.iter().find(|kind| **kind == name).copied();
                let kinds = wanted.split(',').filter(|name| !name.is_empty());
                options.kinds = kinds
                    .map(|name| known(name).ok_or(format!("{name:?} is none of {KINDS:?}")))
                    .collect::<Result<_, _>>()?;
            }
            "--broken" => {
                let wanted = arguments.next().unwrap_or_default();
                let found = Variant::ALL.iter().find(|variant| variant.name() == wanted);
                let names: Vec<_> = Variant::ALL.iter().map(|variant| variant.name()).collect();
                options.broken = Some(*found.ok_or(format!("{wanted:?} is none of {names:?}"))?);
            }
            seed => options.seed = number(Some(seed.to_owned()))?,
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("qsfs-sim: {error}");
            return ExitCode::from(2);
        }
    };
    // Logs cost hash maps, which changes what is drawn for others: a seed with logs is another run than without.
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    }
    if let Err(error) = entropy::fix_addresses() {
        eprintln!("qsfs-sim: addresses stay random, so a seed may not repeat itself: {error}");
    }
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        usual(info);
    }));
    let began = Instant::now();
    entropy::begin(options.seed);
    let report = run(&options, entropy::advance);
    entropy::end();
    let (lines, hash) = &report.trace;
    println!(
        "seed {}: trace {hash} ({lines} lines), {} events, {:.1} virtual s in {:.1} s",
        options.seed,
        report.events,
        report.virtual_time.as_secs_f64(),
        began.elapsed().as_secs_f64(),
    );
    for summary in &report.summaries {
        println!("  {summary}");
    }
    for violation in &report.violations {
        println!("VIOLATION {violation}");
    }
    if report.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
