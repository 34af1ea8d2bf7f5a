//! A machine that comes in is kept in a file.
