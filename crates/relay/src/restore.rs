//! A parked machine as the source of a migration.
