//! `#[derive(VmState)]`; use it through `vmferry-vmstate`, whose crate page says what can be written.
//!
//! The macro turns each attribute into one call on `vmferry_vmstate::Table`, and says what to write
//! where an attribute is missing or wrong.

#![forbid(unsafe_code)]

mod attribute;
mod entry;
mod expand;
mod owner;
mod rust_type;
mod value;
mod word;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Describe a struct field by field; see the crate page of `vmferry-vmstate`.
#[proc_macro_derive(VmState, attributes(vmstate))]
pub fn derive_vm_state(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand::derive(&input)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Errors of a whole struct: all of them are shown at once.
#[derive(Default)]
struct Errors(Option<syn::Error>);

impl Errors {
    fn add(&mut self, error: syn::Error) {
        match &mut self.0 {
            Some(all) => all.combine(error),
            None => self.0 = Some(error),
        }
    }

    /// The value, or `None` after its error was added.
    fn take<T>(&mut self, result: syn::Result<T>) -> Option<T> {
        result.map_err(|error| self.add(error)).ok()
    }

    fn finish(self) -> syn::Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}
