//! What can be read off a Rust type without knowing it.

use quote::ToTokens;
use syn::{Expr, GenericArgument, PathArguments, Type};

use crate::word;

/// A field's type, taken apart.
pub(crate) struct Shape<'a> {
    /// Lengths of the array around the item, outermost first.
    pub(crate) lengths: Vec<&'a Expr>,
    pub(crate) item: &'a Type,
}

impl<'a> Shape<'a> {
    pub(crate) fn of(mut ty: &'a Type) -> Self {
        let mut lengths = Vec::new();
        loop {
            match ty {
                Type::Paren(inner) => ty = &inner.elem,
                Type::Group(inner) => ty = &inner.elem,
                Type::Array(array) => {
                    lengths.push(&array.len);
                    ty = &array.elem;
                }
                item => return Self { lengths, item },
            }
        }
    }

    pub(crate) fn is_array(&self) -> bool {
        !self.lengths.is_empty()
    }
}

/// The argument of `Name<..>`, such as the `T` of `Box<T>`.
pub(crate) fn argument<'a>(ty: &'a Type, name: &str) -> Option<&'a Type> {
    let Type::Path(path) = ty else { return None };
    let last = path
        .path
        .segments
        .last()
        .filter(|last| last.ident == name)?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else {
        return None;
    };
    match arguments.args.first() {
        Some(GenericArgument::Type(ty)) => Some(ty),
        _ => None,
    }
}

/// The word that fits a type, for the error that asks for one.
pub(crate) fn usual_word(ty: &Type) -> &'static str {
    let ty = Shape::of(ty);
    let item = ty.item.to_token_stream().to_string();
    match item.as_str() {
        "u8" if ty.is_array() => "buffer",
        "Option < u64 >" => "timer",
        rust => word::of_rust_type(rust).unwrap_or("uint32"),
    }
}
