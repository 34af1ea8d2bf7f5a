//! Jobs: work that goes on after its command has returned.

use crate::schema::{enumeration, object};

enumeration! {
    /// What a job does.
    JobType = "JobType" {
        /// Migrates disks away. (QEMU's migrations are no jobs.)
        Migrate "x-migrate",
        /// Takes a snapshot of disks.
        SnapshotSave "snapshot-save",
        /// Brings disks back to a snapshot.
        SnapshotLoad "snapshot-load",
        /// Deletes a snapshot of disks.
        SnapshotDelete "snapshot-delete",
    }
}

enumeration! {
    /// How far a job is.
    JobStatus = "JobStatus" {
        /// Unknown.
        Undefined "undefined",
        /// Made, not started.
        Created "created",
        /// At work.
        Running "running",
        /// Stopped for a while.
        Paused "paused",
        /// Can be completed at any time.
        Ready "ready",
        /// Ready and stopped for a while.
        Standby "standby",
        /// Waits for others.
        Waiting "waiting",
        /// Waits for `job-finalize`.
        Pending "pending",
        /// Failed or cancelled, cleaning up.
        Aborting "aborting",
        /// Over; `job-dismiss` makes it go away.
        Concluded "concluded",
        /// Gone.
        Null "null",
    }
}

object! {
    /// An element of `query-jobs`.
    JobInfo = "JobInfo" {
        /// The job's name.
        id "id": String,
        /// What it does.
        kind "type": JobType,
        /// How far it is.
        status "status": JobStatus,
        /// Work done, in no particular unit.
        current_progress "current-progress": u64,
        /// All the work, as far as known.
        total_progress "total-progress": u64,
        /// Why it failed.
        error "error": Option<String>,
    }
}

object! {
    /// Arguments of `snapshot-save`.
    SnapshotSave = "q_obj_snapshot-save-arg" {
        /// A name for the job.
        job_id "job-id": String,
        /// A name for the snapshot.
        tag "tag": String,
        /// One of `devices`: a QEMU puts its machine's state there.
        vmstate "vmstate": String,
        /// The disks.
        devices "devices": Vec<String>,
    }
}

object! {
    /// Arguments of `snapshot-load`.
    SnapshotLoad = "q_obj_snapshot-load-arg" {
        /// A name for the job.
        job_id "job-id": String,
        /// The snapshot.
        tag "tag": String,
        /// One of `devices`: a QEMU takes its machine's state from there.
        vmstate "vmstate": String,
        /// The disks.
        devices "devices": Vec<String>,
    }
}

object! {
    /// Arguments of `snapshot-delete`.
    SnapshotDelete = "q_obj_snapshot-delete-arg" {
        /// A name for the job.
        job_id "job-id": String,
        /// The snapshot.
        tag "tag": String,
        /// The disks.
        devices "devices": Vec<String>,
    }
}

object! {
    /// Arguments of `job-dismiss`.
    JobId = "q_obj_job-dismiss-arg" {
        /// The job's name.
        id "id": String,
    }
}

object! {
    /// Data of `JOB_STATUS_CHANGE`.
    JobStatusChangeEvent = "q_obj_JOB_STATUS_CHANGE-arg" {
        /// The job's name.
        id "id": String,
        /// How far it is now.
        status "status": JobStatus,
    }
}
