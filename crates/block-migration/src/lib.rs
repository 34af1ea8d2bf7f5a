//! The block section: schedule, source and destination of a disk migration.
