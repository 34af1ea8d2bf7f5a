//! What stands between a running machine and a stream.
//!
//! So far that is [`announce`]: telling the network where a guest lives after it has moved.
#![forbid(unsafe_code)]

pub mod announce;
