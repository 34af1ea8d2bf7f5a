//! Images, opened and read.

mod captures;
mod damage;
mod index;
mod libvirt;
mod mapped;
mod refused;
mod script;
mod snapshot;
mod support;
mod together;
