//! The examples do what they say.

use std::fs;
use std::path::Path;

#[path = "../examples/machine.rs"]
#[expect(dead_code, reason = "the program's arguments are not those of a test")]
mod machine;

#[test]
fn a_machine_is_saved_and_loaded() {
    let file =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("machine-{}", std::process::id()));
    machine::run(&file).expect("saved and loaded");
    fs::remove_file(file).expect("it was written");
}
