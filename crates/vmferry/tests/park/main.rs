//! Parked machines and real QEMUs: into a file, out of it again, over several connections, through `mapped-ram` files
//! and snapshots. See `scripts/peers`.

#[path = "../memory/checker.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod checker;
#[path = "../memory/contents.rs"]
mod contents;
#[path = "../memory/link.rs"]
mod link;
#[path = "../memory/monitor.rs"]
mod monitor;
#[path = "../peers/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod peers;

mod connections;
mod damage;
mod deaths;
mod disks;
mod guest;
mod host;
mod interruptions;
mod journeys;
mod kills;
mod learning;
mod many;
mod mapped;
mod snapshots;
mod ways;
