//! Registry, handlers, and the machines that save and load a stream.
