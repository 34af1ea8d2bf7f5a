//! Migration channels: addresses, listeners, reader and writer halves, stop, rate limit.
