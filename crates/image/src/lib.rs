//! A parked machine in a file: what is where in it, its pages by block and offset.

#![forbid(unsafe_code)]
