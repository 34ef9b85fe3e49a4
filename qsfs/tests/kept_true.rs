//! What is written twice is the same in both places.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

fn explained() -> BTreeSet<String> {
    let said = Command::new(env!("CARGO_BIN_EXE_qsfs"))
        .arg("explain")
        .output()
        .unwrap();
    let text = String::from_utf8(said.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn repository(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    fs::read_to_string(root.join(path)).unwrap()
}

/// Quoted or backquoted words in capitals with an underscore.
fn names(text: &str, quote: char) -> BTreeSet<String> {
    let is_name = |word: &&str| {
        word.contains('_')
            && word
                .chars()
                .all(|letter| letter.is_ascii_uppercase() || letter == '_')
    };
    text.split(quote)
        .filter(is_name)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_finding_of_metad_is_explained() {
    let mut found = names(&repository("metad/src/node/status/findings.rs"), '"');
    found.append(&mut names(
        &repository("metad/src/node/status/metads.rs"),
        '"',
    ));
    let certificates = repository("metad/src/node/status/certificates.rs");
    found.append(&mut names(&certificates, '"'));
    assert!(found.len() > 15, "{found:?}");
    let missing: Vec<_> = found.difference(&explained()).cloned().collect();
    assert!(
        missing.is_empty(),
        "`qsfs explain` does not know {missing:?}"
    );
}

#[test]
fn every_explained_finding_is_in_the_operations_manual() {
    let documented = names(&repository("docs/operations.md"), '`');
    let missing: Vec<_> = explained().difference(&documented).cloned().collect();
    assert!(
        missing.is_empty(),
        "docs/operations.md does not list {missing:?}"
    );
}

/// Differences from 0-db are listed with the tests that hold them.
#[test]
fn every_difference_of_the_0_db_has_its_test() {
    let sources: String = [
        "zdb/tests/protocol/commands.rs",
        "zdb/tests/protocol/framing.rs",
        "zdb/tests/protocol/namespaces.rs",
        "zdb/tests/protocol/sessions.rs",
        "qsfs/tests/zdb_server.rs",
    ]
    .map(repository)
    .concat();
    let page = repository("docs/zdb.md");
    let table = page
        .split("## Where it differs")
        .nth(1)
        .and_then(|rest| rest.split("\n## ").next())
        .unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.contains(" | ")).collect();
    assert!(rows.len() > 15, "{rows:?}");
    for row in &rows[1..] {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for test in tests.split('`').skip(1).step_by(2) {
            let is_file = test.contains('/');
            assert!(
                is_file || sources.contains(&format!("fn {test}()")),
                "docs/zdb.md names a test that is not there: {test}"
            );
        }
    }
}
