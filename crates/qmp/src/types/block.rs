//! Disks and exports.

use crate::schema::{enumeration, object};

object! {
    /// Arguments of `query-named-block-nodes`.
    QueryNamedBlockNodes = "q_obj_query-named-block-nodes-arg" {
        /// Leave out backing images.
        flat "flat": Option<bool>,
    }
}

enumeration! {
    /// Are writes of zeroes found by looking at the data?
    DetectZeroes = "BlockdevDetectZeroesOptions" {
        /// No.
        Off "off",
        /// Yes.
        On "on",
        /// Yes, and the space is given back.
        Unmap "unmap",
    }
}

object! {
    /// How the host's cache is used.
    BlockdevCacheInfo = "BlockdevCacheInfo" {
        /// A write is complete before it is durable.
        writeback "writeback": bool,
        /// The host's page cache is passed by.
        direct "direct": bool,
        /// Flushes do nothing.
        no_flush "no-flush": bool,
    }
}

object! {
    /// An internal snapshot of an image.
    SnapshotInfo = "SnapshotInfo" {
        /// A number, as a rule.
        id "id": String,
        /// Its name.
        name "name": String,
        /// Bytes of the machine's state that it holds; 0 if it holds none.
        vm_state_size "vm-state-size": u64,
        /// When it was taken: seconds since 1970.
        date_sec "date-sec": u64,
        /// And nanoseconds.
        date_nsec "date-nsec": u64,
        /// How long the guest had run, in seconds.
        vm_clock_sec "vm-clock-sec": u64,
        /// And nanoseconds.
        vm_clock_nsec "vm-clock-nsec": u64,
        /// How many instructions the guest had run, if they were counted.
        icount "icount": Option<u64>,
        /// How long the disk was, in bytes, if that is known.
        x_disk_size "x-disk-size": Option<u64>,
    }
}

object! {
    /// An image.
    ImageInfo = "ImageInfo" {
        /// Its file.
        filename "filename": String,
        /// Its format.
        format "format": String,
        /// Length that a guest sees, in bytes.
        virtual_size "virtual-size": u64,
        /// Space taken on the host, in bytes.
        actual_size "actual-size": Option<u64>,
        /// Allocation unit in bytes.
        cluster_size "cluster-size": Option<u64>,
        /// Its internal snapshots, if it has any.
        snapshots "snapshots": Option<Vec<SnapshotInfo>>,
    }
}

enumeration! {
    /// What guests wait for.
    HoldLevel = "XHoldLevel" {
        /// Nothing: requests run.
        Nothing "nothing",
        /// Writes wait, reads run.
        Writes "writes",
        /// Everything waits: the disk may be live elsewhere.
        Everything "everything",
        /// The disk was given up; requests fail.
        Departed "departed",
    }
}

object! {
    /// A disk.
    BlockDeviceInfo = "BlockDeviceInfo" {
        /// The image's file.
        file "file": String,
        /// The disk's name.
        node_name "node-name": Option<String>,
        /// Writes are refused.
        ro "ro": bool,
        /// The format driver.
        drv "drv": String,
        /// Number of backing images below this one.
        backing_file_depth "backing_file_depth": u64,
        /// Not given up.
        active "active": bool,
        /// Encrypted.
        encrypted "encrypted": bool,
        /// Are zeroes searched for?
        detect_zeroes "detect_zeroes": DetectZeroes,
        /// Limit in bytes per second; 0 is none, as in the five that follow.
        bps "bps": u64,
        /// For reads.
        bps_rd "bps_rd": u64,
        /// For writes.
        bps_wr "bps_wr": u64,
        /// Limit in requests per second.
        iops "iops": u64,
        /// For reads.
        iops_rd "iops_rd": u64,
        /// For writes.
        iops_wr "iops_wr": u64,
        /// The image.
        image "image": ImageInfo,
        /// The cache.
        cache "cache": BlockdevCacheInfo,
        /// Not used; 0.
        write_threshold "write_threshold": u64,
        /// What guests wait for.
        x_hold "x-hold": Option<HoldLevel>,
        /// Who has the disk for itself, and so blocks other operations on it.
        x_blocked_by "x-blocked-by": Option<String>,
        /// Bytes written since a migration last looked.
        x_dirty_bytes "x-dirty-bytes": Option<u64>,
    }
}

object! {
    /// An element of `query-block`.
    BlockInfo = "BlockInfo" {
        /// The device's name.
        device "device": String,
        /// Path in the device tree.
        qdev "qdev": Option<String>,
        /// Always `unknown`.
        kind "type": String,
        /// The medium can be changed.
        removable "removable": bool,
        /// The guest keeps the medium in.
        locked "locked": bool,
        /// The medium.
        inserted "inserted": Option<BlockDeviceInfo>,
    }
}

enumeration! {
    /// How a disk is exported.
    BlockExportType = "BlockExportType" {
        /// NBD.
        Nbd "nbd",
    }
}

object! {
    /// An element of `query-block-exports`.
    BlockExportInfo = "BlockExportInfo" {
        /// The export.
        id "id": String,
        /// How it is exported.
        kind "type": BlockExportType,
        /// The disk.
        node_name "node-name": String,
        /// On its way out.
        shutting_down "shutting-down": bool,
    }
}
