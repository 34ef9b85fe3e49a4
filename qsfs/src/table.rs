//! Listings: aligned columns for people, JSON with a schema version for programs.

use anyhow::Context;
use qsfs_proto::status::SCHEMA_VERSION;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::io::{self, Write};

/// Rows under headings.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self {
            rows: vec![headings.iter().map(|text| (*text).to_owned()).collect()],
        }
    }

    /// One more row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Columns two spaces apart; numbers are left as they are written.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// To standard output.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        print(&self.render())
    }
}

/// Writes to standard output. A reader that has left (`| head`) is not an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("writing to standard output"),
    }
}

/// `{"schema_version": 1, NAME: what}`.
pub(crate) fn print_json(name: &str, what: &impl Serialize) -> anyhow::Result<()> {
    let mut object = Map::new();
    object.insert("schema_version".into(), json!(SCHEMA_VERSION));
    object.insert(name.into(), serde_json::to_value(what)?);
    print_value(&Value::Object(object))
}

/// A value that has its schema version already.
pub(crate) fn print_value(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_characters() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["größe".into(), "up".into()]);
        assert_eq!(table.render(), "NAME   STATE\ngröße  up\n");
    }
}
