//! Registry and machines, both ends in one process.

mod configuration;
mod devices;
mod hostile;
mod live;
mod parts;
mod postcopy;
mod registry;
mod save;
mod slice;
