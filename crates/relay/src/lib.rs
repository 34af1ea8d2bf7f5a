//! What stands between a running machine and a stream.
