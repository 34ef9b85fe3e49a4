//! `qsfs info`: where a file's bytes are.

use crate::table::{Table, print, print_json};
use crate::umount::refusal;
use crate::units;
use anyhow::bail;
use clap::Args;
use qsfs_fuse_client::control::{Answer, Client, DatafileInfo, FileInfo, Request, find};
use std::path::PathBuf;

/// `qsfs info`.
#[derive(Debug, Args)]
pub(crate) struct InfoArguments {
    /// A file of a mounted volume
    path: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) async fn run(arguments: &InfoArguments) -> anyhow::Result<()> {
    let found = find(&arguments.path).map_err(refusal)?;
    let request = Request::Info { path: found.below };
    let answer = Client::new(found.socket).ask(&request, |_| {}).await;
    let Answer::Info(info) = answer.map_err(refusal)? else {
        bail!("the mount answered another question");
    };
    if arguments.json {
        return print_json("file", &info);
    }
    show(&info)
}

fn show(info: &FileInfo) -> anyhow::Result<()> {
    print(&format!(
        "{}: inode {}, {} in {} extents, {} datafiles\n",
        info.path.display(),
        info.ino,
        units::bytes(info.size),
        info.extents.len(),
        info.datafiles.len()
    ))?;
    if !info.records_missing.is_empty() {
        print(&format!(
            "metad could not be asked for shards: {}\n",
            info.records_missing
        ))?;
    }
    for datafile in &info.datafiles {
        let bytes: u64 = info
            .extents
            .iter()
            .filter(|extent| extent.datafile == datafile.datafile)
            .map(|extent| extent.bytes)
            .sum();
        print(&format!("\n{}\n", heading(datafile, bytes)))?;
        if !datafile.shards.is_empty() {
            shards(datafile).print()?;
        }
    }
    Ok(())
}

fn heading(datafile: &DatafileInfo, bytes: u64) -> String {
    let cached = match datafile.local.as_str() {
        "remote" => "not cached",
        other => other,
    };
    let committed = match datafile.committed {
        true => format!("committed at {}", datafile.geometry),
        false => "AT RISK: only on this machine".to_owned(),
    };
    format!(
        "datafile {}: {} of this file, {cached}, {committed}",
        datafile.datafile,
        units::bytes(bytes)
    )
}

fn shards(datafile: &DatafileInfo) -> Table {
    let mut table = Table::new(&[
        "SHARD",
        "BACKEND",
        "LOCATION",
        "NODE",
        "BACKEND IS",
        "SHARD IS",
    ]);
    for shard in &datafile.shards {
        table.row(vec![
            shard.shard.to_string(),
            shard.backend.to_string(),
            shard.location.clone(),
            shard.node.clone(),
            shard.verdict.clone(),
            shard.state.clone(),
        ]);
    }
    table
}
