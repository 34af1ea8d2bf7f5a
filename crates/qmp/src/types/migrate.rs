//! Migration.

use serde_json::{Map, Value};

use crate::schema::{enumeration, object};
use crate::types::MigrationChannel;

object! {
    /// Arguments of `migrate`.
    Migrate = "q_obj_migrate-arg" {
        /// Where to: `tcp:HOST:PORT`, `unix:PATH`, `fd:NAME` (of `getfd`).
        uri "uri": Option<String>,
        /// The same, as QEMU 8.2 and later let it be said: one channel.
        channels "channels": Option<Vec<MigrationChannel>>,
        /// With the disks. A storage daemon migrates nothing else: `false` is refused.
        blk "blk": Option<bool>,
        /// With what the disks' top layers hold, and without what lies below: the destination has
        /// that. As `block-incremental` says if it is not given.
        inc "inc": Option<bool>,
        /// Taken for compatibility: the command always returns at once.
        detach "detach": Option<bool>,
        /// Only these disks.
        x_disks "x-disks": Option<Vec<String>>,
        /// The channel has no way back: nothing confirms that the destination took over.
        x_one_way "x-one-way": Option<bool>,
        /// Stop before anything is sent; say what would go wrong.
        x_check "x-check": Option<bool>,
    }
}

object! {
    /// Arguments of `migrate-incoming`.
    MigrateIncoming = "q_obj_migrate-incoming-arg" {
        /// Where to listen: `tcp:HOST:PORT`, `unix:PATH`.
        uri "uri": String,
    }
}

object! {
    /// Arguments of `migrate-set-parameters` and answer of `query-migrate-parameters`.
    MigrationParameters = "MigrationParameters" {
        /// Most bytes per second on the channel; 0 is no limit.
        max_bandwidth "max-bandwidth": Option<u64>,
        /// Longest time that guests may be held at the end, in milliseconds.
        downtime_limit "downtime-limit": Option<u64>,
        /// Disks travel, and arrive, without what lies below their top layers.
        block_incremental "block-incremental": Option<bool>,
        /// Milliseconds from the first announcement of an arrived guest to the second.
        announce_initial "announce-initial": Option<u64>,
        /// Milliseconds between two announcements at most.
        announce_max "announce-max": Option<u64>,
        /// How often an arrived guest is announced.
        announce_rounds "announce-rounds": Option<u64>,
        /// Milliseconds by which the time between two announcements grows.
        announce_step "announce-step": Option<u64>,
    }
}

object! {
    /// Arguments of `announce-self`.
    AnnounceParameters = "AnnounceParameters" {
        /// Milliseconds from the first round to the second.
        initial "initial": i64,
        /// Milliseconds between two rounds at most.
        max "max": i64,
        /// How many rounds.
        rounds "rounds": i64,
        /// Milliseconds by which the time between two rounds grows.
        step "step": i64,
        /// Only these NICs; those that nobody knows are passed over.
        interfaces "interfaces": Option<Vec<String>>,
        /// What it is called: it ends an announcement of this name that is under way. None is the
        /// empty name.
        id "id": Option<String>,
    }
}

enumeration! {
    /// A feature that can be switched.
    MigrationCapability = "MigrationCapability" {
        /// With the disks: always on, a storage daemon migrates nothing else.
        Block "block",
        /// Send zero chunks without their data.
        ZeroBlocks "zero-blocks",
        /// Send `MIGRATION` and `MIGRATION_PASS`.
        Events "events",
        /// The destination answers; without it nothing confirms that it took over.
        ReturnPath "return-path",
        /// Wait in `pre-switchover` for `migrate-continue`.
        PauseBeforeSwitchover "pause-before-switchover",
    }
}

object! {
    /// A feature and whether it is on.
    MigrationCapabilityStatus = "MigrationCapabilityStatus" {
        /// The feature.
        capability "capability": MigrationCapability,
        /// On.
        state "state": bool,
    }
}

object! {
    /// Arguments of `migrate-set-capabilities`.
    MigrateSetCapabilities = "q_obj_migrate-set-capabilities-arg" {
        /// Those to change.
        capabilities "capabilities": Vec<MigrationCapabilityStatus>,
    }
}

/// Features of QEMU (2.0 to 10) that are never on here.
const ABSENT_CAPABILITIES: &[&str] = &[
    "auto-converge",
    "background-snapshot",
    "compress",
    "dirty-bitmaps",
    "dirty-limit",
    "late-block-activate",
    "mapped-ram",
    "multifd",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "switchover-ack",
    "validate-uuid",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
];

/// Who drives many QEMUs switches everything off that it does not want: that is done already.
pub(crate) fn drop_absent_capabilities(arguments: &mut Map<String, Value>) {
    let Some(Value::Array(changes)) = arguments.get_mut("capabilities") else {
        return;
    };
    changes.retain(|change| {
        let name = change.get("capability").and_then(Value::as_str);
        let known = name.is_some_and(|name| ABSENT_CAPABILITIES.contains(&name));
        let members = change.as_object().map_or(0, Map::len);
        !(known && members == 2 && change.get("state") == Some(&Value::Bool(false)))
    });
}

enumeration! {
    /// How far a migration is.
    MigrationStatus = "MigrationStatus" {
        /// There has been none.
        None "none",
        /// Connecting, opening.
        Setup "setup",
        /// A cancel is under way.
        Cancelling "cancelling",
        /// Cancelled; the source serves on.
        Cancelled "cancelled",
        /// Copying.
        Active "active",
        /// The guest runs on the destination, the rest is being fetched.
        PostcopyActive "postcopy-active",
        /// The link broke after that.
        PostcopyPaused "postcopy-paused",
        /// A recovery is being prepared.
        PostcopyRecoverSetup "postcopy-recover-setup",
        /// A recovery is under way.
        PostcopyRecover "postcopy-recover",
        /// Whole.
        Completed "completed",
        /// Failed.
        Failed "failed",
        /// In lockstep.
        Colo "colo",
        /// Waits for `migrate-continue`.
        PreSwitchover "pre-switchover",
        /// Guests are held, the last data is on its way.
        Device "device",
        /// Waits for devices to be unplugged.
        WaitUnplug "wait-unplug",
    }
}

object! {
    /// Progress in bytes.
    MigrationStats = "MigrationStats" {
        /// Sent.
        transferred "transferred": u64,
        /// Still to send.
        remaining "remaining": u64,
        /// All there is.
        total "total": u64,
        /// Zero pages (chunks, for disks).
        duplicate "duplicate": u64,
        /// Pages (chunks) with data.
        normal "normal": u64,
        /// Their bytes.
        normal_bytes "normal-bytes": u64,
        /// Pages (chunks) written per second by guests.
        dirty_pages_rate "dirty-pages-rate": u64,
        /// Throughput in megabits per second.
        mbps "mbps": f64,
        /// Passes over what became dirty.
        dirty_sync_count "dirty-sync-count": u64,
        /// Pages asked for by the destination.
        postcopy_requests "postcopy-requests": u64,
        /// Size of a page (a chunk, for disks).
        page_size "page-size": u64,
        /// Bytes on extra channels.
        multifd_bytes "multifd-bytes": u64,
        /// Pages (chunks) per second.
        pages_per_second "pages-per-second": u64,
        /// Bytes before the guest was stopped.
        precopy_bytes "precopy-bytes": u64,
        /// Bytes while it was stopped.
        downtime_bytes "downtime-bytes": u64,
        /// Bytes after it ran on the destination.
        postcopy_bytes "postcopy-bytes": u64,
    }
}

enumeration! {
    /// Who has the disks, once the end of the stream was given to the kernel.
    HandOver = "XHandOver" {
        /// Not there yet: the source has them.
        NotYet "not-yet",
        /// Nobody knows; both sides hold. `x-resolve` decides.
        Undecided "undecided",
        /// The source serves on.
        Kept "kept",
        /// The destination has them.
        GivenUp "given-up",
    }
}

object! {
    /// Progress of one disk.
    DiskProgress = "XDiskProgress" {
        /// The disk.
        name "name": String,
        /// Its length in bytes.
        total "total": u64,
        /// Bytes that the other side has as they are here.
        transferred "transferred": u64,
        /// Bytes still to do.
        remaining "remaining": u64,
    }
}

object! {
    /// Answer of `query-migrate`.
    MigrationInfo = "MigrationInfo" {
        /// How far it is.
        status "status": Option<MigrationStatus>,
        /// Memory.
        ram "ram": Option<MigrationStats>,
        /// Disks.
        disk "disk": Option<MigrationStats>,
        /// Since the start, in milliseconds.
        total_time "total-time": Option<u64>,
        /// How long guests would be held if it ended now, in milliseconds.
        expected_downtime "expected-downtime": Option<u64>,
        /// How long guests were held, in milliseconds.
        downtime "downtime": Option<u64>,
        /// From the command to the first data, in milliseconds.
        setup_time "setup-time": Option<u64>,
        /// Why it failed.
        error_desc "error-desc": Option<String>,
        /// Why none can be started.
        blocked_reasons "blocked-reasons": Option<Vec<String>>,
        /// Who has the disks.
        x_hand_over "x-hand-over": Option<HandOver>,
        /// The destination said that everything is synced.
        x_durable "x-durable": Option<bool>,
        /// What is being done, for people.
        x_phase "x-phase": Option<String>,
        /// Number of the pass; 1 is the first copy.
        x_pass "x-pass": Option<u64>,
        /// Each disk.
        x_disks "x-disks": Option<Vec<DiskProgress>>,
        /// Bytes per second that guests make dirty.
        x_dirty_rate "x-dirty-rate": Option<u64>,
        /// Bytes per second on the channel.
        x_bandwidth "x-bandwidth": Option<u64>,
        /// Expected milliseconds to the end; left out when it will not end as things are.
        x_forecast "x-forecast": Option<u64>,
        /// Why it does not come to an end, and what would help.
        x_stall "x-stall": Option<String>,
    }
}

object! {
    /// Arguments of `migrate-continue`.
    MigrateContinue = "q_obj_migrate-continue-arg" {
        /// The state that it waits in.
        state "state": MigrationStatus,
    }
}

enumeration! {
    /// What becomes of disks whose hand-over is undecided.
    Resolution = "XResolution" {
        /// They are live here.
        Serve "serve",
        /// They are live elsewhere.
        GiveUp "give-up",
    }
}

object! {
    /// Arguments of `x-resolve`.
    Resolve = "q_obj_x-resolve-arg" {
        /// The decision.
        decision "decision": Resolution,
    }
}

object! {
    /// Data of `MIGRATION`.
    MigrationEvent = "q_obj_MIGRATION-arg" {
        /// How far it is now.
        status "status": MigrationStatus,
    }
}

object! {
    /// Data of `MIGRATION_PASS`.
    MigrationPassEvent = "q_obj_MIGRATION_PASS-arg" {
        /// The pass that begins.
        pass "pass": u64,
    }
}
