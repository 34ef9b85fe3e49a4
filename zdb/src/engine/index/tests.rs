#![expect(clippy::unwrap_used, reason = "tests")]

use super::paged::PagedTable;
use super::record::{Entry, Place};
use super::user::UserTable;
use crate::media::{Media, SimMedia};
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn entry(version: u64, deleted: bool) -> Entry {
    Entry {
        version,
        place: Place {
            file: 3,
            offset: version * 8,
        },
        value_bytes: u32::try_from(version % (8 << 20)).unwrap(),
        value_crc: 7,
        timestamp: 9,
        deleted,
        linked: version.is_multiple_of(3),
        stale: 11,
    }
}

#[test]
fn records_survive_encoding() {
    for version in [1, 2, 3, 1 << 29] {
        for deleted in [false, true] {
            let entry = entry(version, deleted);
            assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }
    }
    assert_eq!(Entry::decode(&[0; 32]), None);
}

fn key(number: u16) -> Vec<u8> {
    // Keys of different lengths.
    vec![u8::try_from(number % 251).unwrap(); usize::from(number % 37) + 1]
}

type Model = BTreeMap<Vec<u8>, Entry>;

fn assert_ordered(table: &UserTable, model: &Model) {
    let mut wanted: Vec<(u64, Vec<u8>)> = model
        .iter()
        .filter(|(_, entry)| !entry.deleted)
        .map(|(key, entry)| (entry.version, key.clone()))
        .collect();
    wanted.sort();
    let listed = |(version, key, entry): (u64, &[u8], Entry)| {
        assert_eq!(version, entry.version);
        (version, key.to_vec())
    };
    assert_eq!(table.after(None).map(listed).collect::<Vec<_>>(), wanted);
    let mut backwards: Vec<_> = table.before(None).map(listed).collect();
    backwards.reverse();
    assert_eq!(backwards, wanted);
    for from in [0, 1, 5, 500, 1400, u64::MAX] {
        let after: Vec<_> = table.after(Some(from)).map(listed).collect();
        let rest: Vec<_> = wanted.iter().filter(|(v, _)| *v > from).cloned().collect();
        assert_eq!(after, rest);
        let before = table.before(Some(from)).map(listed).count();
        assert_eq!(before, wanted.iter().filter(|(v, _)| *v < from).count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn the_user_table_is_a_map(
        steps in prop::collection::vec((any::<u16>(), 0..4_u8, any::<bool>()), 1..3000),
    ) {
        let mut table = UserTable::new();
        let mut model = Model::new();
        for (at, (number, what, shuffled)) in steps.iter().enumerate() {
            let key = key(number % 900);
            // Mostly rising, as commits are; now and then from behind, as while loading.
            let version = at as u64 * 2 + 1;
            let version = if *shuffled { version } else { 20_000 - version };
            match what {
                0 => {
                    table.remove(&key);
                    model.remove(&key);
                }
                what => {
                    let entry = entry(version, *what == 1);
                    table.put(&key, &entry);
                    model.insert(key.clone(), entry);
                }
            }
            assert_eq!(table.get(&key), model.get(&key).copied());
        }
        for number in 0..900 {
            assert_eq!(table.get(&key(number)), model.get(&key(number)).copied());
        }
        assert_ordered(&table, &model);
    }

    #[test]
    fn the_paged_table_is_a_map(
        steps in prop::collection::vec((0..2000_u64, 0..4_u8), 1..1500),
    ) {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new());
        media.create_dir_all(Path::new("/ns")).unwrap();
        // Two pages of memory for sixteen pages of ids.
        let mut table = PagedTable::with_cache(&media, Path::new("/ns"), 2).unwrap();
        let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
        for (at, (id, what)) in steps.iter().enumerate() {
            let key = id.to_le_bytes();
            if *what == 0 {
                table.remove(&key).unwrap();
                model.remove(id);
            } else {
                let entry = entry(at as u64 + 1, *what == 1);
                table.put(&key, &entry).unwrap();
                model.insert(*id, entry);
            }
            assert_eq!(table.get(&key).unwrap(), model.get(id).copied());
        }
        for id in 0..2000_u64 {
            assert_eq!(table.get(&id.to_le_bytes()).unwrap(), model.get(&id).copied());
        }
        let live: Vec<(u64, Entry)> = model
            .into_iter()
            .filter(|(_, entry)| !entry.deleted)
            .collect();
        for from in [0, 1, 126, 127, 1000, 1999] {
            let up: Vec<_> = live.iter().filter(|(id, _)| *id >= from).take(50).copied().collect();
            assert_eq!(table.walk(Some(from), true, 50).unwrap(), up);
            let down: Vec<_> = live.iter().rev().filter(|(id, _)| *id <= from).take(50).copied().collect();
            assert_eq!(table.walk(Some(from), false, 50).unwrap(), down);
        }
        assert_eq!(table.walk(Some(u64::MAX), false, 5000).unwrap().len(), live.len());
        assert_eq!(table.walk(None, true, 5).unwrap(), vec![]);
    }
}
