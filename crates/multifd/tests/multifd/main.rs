//! Many connections to one plain stream and back, in one process.

mod captures;
mod ends;
mod hostile;
mod plain;
mod round_trip;
mod streams;
