//! What each command does.

pub(crate) mod cancel;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod convert;
mod daemon;
pub(crate) mod demo;
pub(crate) mod diff;
pub(crate) mod extract;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod migrate;
mod parked;
mod parking;
pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod schema;
pub(crate) mod send;
pub(crate) mod serve;
pub(crate) mod set;
pub(crate) mod snapshot;
pub(crate) mod status;
mod watch;
mod whole_file;
