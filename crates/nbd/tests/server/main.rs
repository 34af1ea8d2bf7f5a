//! The server and the client against each other, and the server against clients that misbehave and
//! against other programs.

mod data;
mod interop;
mod support;
mod trouble;
