//! The storage daemon as a library: exports, QMP commands, migration jobs.
