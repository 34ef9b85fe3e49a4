//! `qsfs explain NAME`: what a finding means and what to do.

use anyhow::bail;

/// Every finding: name, meaning, what to do. `docs/operations.md` lists the same names (a test compares).
pub(crate) const FINDINGS: &[(&str, &str, &str)] = &[
    (
        "LOCATION_DOWN",
        "No backend of a location answers. Data stays readable as long as the loss budget says so; new data is stored on the other locations, below policy.",
        "Bring the location's agents back (`qsfs agent serve --data DIR`). Re-silver returns everything to policy by itself; if the location stays away for lost-after, its shards are rebuilt elsewhere.",
    ),
    (
        "NODE_DOWN",
        "No backend of one node answers, while others of its location do.",
        "Start its agent again (`qsfs agent serve --data DIR`) or repair the machine. After lost-after its shards are rebuilt elsewhere.",
    ),
    (
        "BACKEND_DOWN",
        "A backend does not answer, or its agent reports that its directory or disk fails.",
        "Look at the agent's log. If the disk is gone for good nothing needs to be done: after lost-after its shards are rebuilt on the other backends.",
    ),
    (
        "BACKEND_FULL",
        "A backend has no room for further shards; others are chosen.",
        "Add a backend (`qsfs agent join`), or delete data.",
    ),
    (
        "POLICY_BELOW",
        "Some datafiles do not survive what the volume's policy promises.",
        "Nothing, if re-silver makes progress. `qsfs heal status` says what it waits for: usually for backends in another location.",
    ),
    (
        "DATA_UNREADABLE",
        "Fewer than k shards of some datafiles can be reached: they cannot be read now.",
        "Bring backends back; nothing can be rebuilt from fewer than k shards.",
    ),
    (
        "AT_RISK_AGE",
        "Data older than the push interval is only on the machine that mounts the volume: losing it loses this data.",
        "See why pushing does not go on: the writer's log, the backends' state. `qsfs sync DIR --allow-degraded` pushes now.",
    ),
    (
        "PUSH_BLOCKED",
        "The writer cannot push; the text says why.",
        "Do what the text says; usually backends or metad are missing.",
    ),
    (
        "NO_QUORUM",
        "No majority of the metad nodes answers. Mounts go on reading and writing locally, nothing can be committed.",
        "Start the missing metad nodes (`qsfs metad serve --data DIR`).",
    ),
    (
        "METAD_DOWN",
        "A metad node does not answer. With one more missing there may be no quorum.",
        "Start it again (`qsfs metad serve --data DIR`).",
    ),
    (
        "SHARDS_BAD",
        "Shards were found missing or corrupt, by a read or by a scrub; they are being made again.",
        "Nothing for a few. If one backend has many, its disk is failing: `qsfs backend drain ID --apply`.",
    ),
    (
        "STILL_COUNTING",
        "The leading metad has not looked at all encoding records since it leads, or since backends that hold much of them changed.",
        "Nothing: with millions of records it takes some ten seconds. Until then what is missing may be more than is said.",
    ),
    (
        "RESILVER_WAITING",
        "There are shards to make, and the text says what that waits for.",
        "Give it what it waits for: usually backends with room, at the right location.",
    ),
    (
        "AT_RISK_UNKNOWN",
        "The client that writes the volume was not heard for a while, so it is not known what is at risk there.",
        "Look at that machine: is the mount alive, does it reach metad? If it is gone for good, mount elsewhere with the recovery kit and --takeover.",
    ),
    (
        "METAD_RENEWING",
        "A metad node does not vote yet: it has just joined, or its disk was damaged and it copies everything from its peers under a new id.",
        "Wait: it votes by itself when it has caught up. If that takes long, see its log.",
    ),
    (
        "METAD_MAJORITY",
        "One location holds a majority of the metad voters. When it is lost, nothing can be committed until it returns.",
        "Move a voter: `qsfs token create --role metad`, `qsfs metad join` at another location, then `qsfs metad remove NAME --apply`.",
    ),
    (
        "METAD_DISK_FULL",
        "The disk under a metad's data directory is full or nearly so. Without room for its log the node takes no part; nothing acknowledged is lost.",
        "Make room on that disk: the node goes on by itself. Or stop it, move its data directory to a larger disk, and serve from there.",
    ),
    (
        "METAD_VERSIONS",
        "The metad nodes run different programs. They work together; what only the newer ones can do waits.",
        "Go on with the upgrade, one node at a time, waiting for `qsfs status` to be well in between.",
    ),
    (
        "BACKUP_OLD",
        "A metad node has not written a backup of the metadata for several hours, though it writes one an hour.",
        "See its log and its disk. `qsfs metad backup --data DIR --to FILE` writes one now.",
    ),
    (
        "BACKUP_FAILING",
        "A metad node could not write, or not read back, its newest backup of the metadata; the text says why.",
        "Mend what the text says (usually the disk), then `qsfs metad backup --data DIR --to FILE`.",
    ),
    (
        "BACKUP_SHRUNK",
        "The newest backup of a metad node holds less than half the rows of the one before. No older one is removed for it.",
        "If volumes or much data were deleted, nothing. Else copy the older files of DATA/backups away and find out why; `qsfs metad verify FILE` says what one holds.",
    ),
    (
        "CERTIFICATE_EXPIRES",
        "The certificate of a metad node or an agent ends soon and was not renewed, though every process renews its own when a third of its life is left. After that nobody can connect to it.",
        "See in its log why. `qsfs certificate renew --data DIR` on its machine renews now. An agent whose certificate has ended: `qsfs token create --role agent`, then `qsfs certificate renew --data DIR --token-file FILE`; its backends stay as they are.",
    ),
    (
        "AUTHORITY_EXPIRES",
        "The cluster's certificate authority, made at bootstrap for twenty years, ends within two years. No certificate outlives it: after that nobody can connect to anybody.",
        "There is no command that replaces an authority. Bootstrap a new cluster beside this one, copy the data of every volume into it (mount both), and retire this one.",
    ),
];

/// Prints one, or all names.
pub(crate) fn run(name: Option<&str>) -> anyhow::Result<()> {
    let Some(name) = name else {
        let names: Vec<&str> = FINDINGS.iter().map(|(name, ..)| *name).collect();
        return crate::table::print(&(names.join("\n") + "\n"));
    };
    let wanted = name.to_ascii_uppercase();
    match FINDINGS.iter().find(|(known, ..)| *known == wanted) {
        Some((name, meaning, advice)) => {
            crate::table::print(&format!("{name}\n\n{meaning}\n\nWhat to do: {advice}\n"))
        }
        None => bail!("no finding is called {wanted}; `qsfs explain` lists all names"),
    }
}
