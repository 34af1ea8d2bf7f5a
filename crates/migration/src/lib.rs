//! The migration engine: parameters, status, source, destination, hand-over.
