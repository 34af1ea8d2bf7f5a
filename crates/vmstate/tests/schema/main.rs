//! Schemas: the text that QEMU writes, our own descriptions, streams, and what follows for loading.

mod build;
mod dumped;
mod programs;
mod rules;
mod streams;
mod text;
