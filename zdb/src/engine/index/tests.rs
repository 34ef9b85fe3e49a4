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

/// The bound that operators plan with. Tables double, so it is looked at all the way, and again after three quarters were overwritten
/// and every other key was deleted.
#[test]
fn a_user_key_costs_at_most_64_bytes_beside_itself() {
    const KEYS: u64 = 600_000;
    let key = |number: u64| [number.to_be_bytes(), number.to_le_bytes()].concat();
    let mut table = UserTable::new();
    let mut worst = 0;
    for number in 0..KEYS {
        table.put(&key(number), &entry(number + 1, false));
        if number >= 100_000 && number.is_multiple_of(1000) {
            worst = worst.max(table.memory_bytes() / usize::try_from(number + 1).unwrap());
        }
    }
    let mut version = KEYS;
    for number in (0..KEYS).filter(|number| !number.is_multiple_of(4)) {
        version += 1;
        table.put(&key(number), &entry(version, false));
    }
    worst = worst.max(table.memory_bytes() / usize::try_from(KEYS).unwrap());
    assert!(worst <= 64 + 16, "{worst} bytes a key of 16 bytes");
    // What was freed is used again.
    let full = table.memory_bytes();
    for number in (0..KEYS).step_by(2) {
        table.remove(&key(number));
    }
    for number in (0..KEYS).step_by(2) {
        version += 1;
        table.put(&key(number), &entry(version, false));
    }
    assert!(table.memory_bytes() <= full + full / 8);
}

/// A page that comes back changed is an error, not an answer.
#[test]
fn rot_in_a_page_of_the_index_is_an_error() {
    let sim = SimMedia::new();
    let media: Arc<dyn Media> = Arc::new(sim.clone());
    media.create_dir_all(Path::new("/ns")).unwrap();
    let mut table = PagedTable::with_cache(&media, Path::new("/ns"), 2).unwrap();
    for id in 0..1000_u64 {
        table.put(&id.to_le_bytes(), &entry(id + 1, false)).unwrap();
    }
    sim.flip_unnamed(100, 0x40);
    assert!(table.get(&0_u64.to_le_bytes()).is_err());
    assert!(table.get(&999_u64.to_le_bytes()).unwrap().is_some());
    assert!(table.walk(Some(0), true, 10).is_err());
}
