//! One table, one row a measurement: what the machine can do beside what the mount does.

use std::fmt::Write as _;

/// One measurement.
pub(crate) struct Row {
    /// What was done.
    pub(crate) what: String,
    /// Unit of the three numbers.
    pub(crate) unit: &'static str,
    /// In a plain directory.
    pub(crate) plain: Option<f64>,
    /// In the memory filesystem over the same FUSE crate.
    pub(crate) memory: Option<f64>,
    /// Through the mount or the cluster.
    pub(crate) ours: f64,
    /// CPU-seconds per GiB (or per 10,000 operations, as `what` says) of all our processes and the caller.
    pub(crate) cpu: Option<f64>,
    /// The number to beat three times, from the predecessors on such a machine.
    pub(crate) predecessor: Option<f64>,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// Adds one, and says it at once.
    pub(crate) fn row(&mut self, row: Row) {
        eprintln!("{:<58} {:>10} {}", row.what, number(row.ours), row.unit);
        self.rows.push(row);
    }

    /// Adds a sentence under the table.
    pub(crate) fn note(&mut self, text: String) {
        eprintln!("{text}");
        self.notes.push(text);
    }

    /// As Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "| what | unit | plain directory | memory FUSE | QSFS | of plain | of memory FUSE | CPU-s | predecessor | times it |\n\
             | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for row in &self.rows {
            let ratio = |base: Option<f64>| {
                base.map_or(String::from("-"), |base| format!("{:.2}", row.ours / base))
            };
            let shown = |value: Option<f64>| value.map_or(String::from("-"), number);
            let _infallible = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.what,
                row.unit,
                shown(row.plain),
                shown(row.memory),
                number(row.ours),
                ratio(row.plain),
                ratio(row.memory),
                row.cpu.map_or(String::from("-"), |cpu| format!("{cpu:.2}")),
                shown(row.predecessor),
                row.predecessor
                    .map_or(String::from("-"), |old| format!("{:.1}", row.ours / old)),
            );
        }
        for note in &self.notes {
            let _infallible = write!(text, "\n- {note}");
        }
        text.push('\n');
        text
    }
}

fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.1}"),
        v => format!("{v:.3}"),
    }
}
