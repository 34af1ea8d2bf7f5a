//! A parked machine in another form: plain stream, mapped-ram file.
