//! Both engines over real threads and sockets: cut anywhere, cancelled, lied to, short of disk space.

mod bad_input;
mod cuts;
mod durability;
mod ends;
mod failures;
mod liars;
mod link;
