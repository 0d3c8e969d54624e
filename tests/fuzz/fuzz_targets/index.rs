//! The other JSON files of a folder: an accepted index names only files inside the folder.
#![no_main]

use fourbit::checkpoint::config::Config;
use fourbit::checkpoint::index::Index;
use fourbit::checkpoint::{Manifest, names};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(index) = Index::parse(text) {
        for shard in index.weight_map.values() {
            assert!(names::is_file_name(shard) && !shard.contains(['/', '\\', '\0']));
        }
        assert_eq!(Index::parse(&index.to_json(0)).ok(), Some(index));
    }
    let _ = Manifest::parse(text);
    let _ = Config::parse(text.to_owned());
});
