//! The commands that look into streams, schemas and images.

#[path = "../peers/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod peers;

mod check;
mod diff;
mod extract;
mod inspect;
mod outcome;
mod parked;
mod schema;
mod snapshot;
