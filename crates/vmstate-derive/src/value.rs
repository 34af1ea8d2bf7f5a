//! The call on a `Table` for one value.

use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Error, Expr, Result, Type};

use crate::entry::{Conversion, Entry, Kind, Number};
use crate::expand::Described;
use crate::rust_type::{Shape, argument};
use crate::word;

/// The call that adds one value to the table.
pub(crate) fn call(field: &Described<'_>, entry: &Entry) -> Result<TokenStream> {
    let span = entry.word.span();
    let default = match entry.kind {
        Kind::Unused(_) => "unused".to_owned(),
        Kind::Tmp(_) => "tmp".to_owned(),
        _ => field.ident.unraw().to_string(),
    };
    let name = entry.name.as_ref().map_or(default, syn::LitStr::value);
    let at = accessor(field, entry);
    let ty = holder(field, entry);
    let call = match &entry.kind {
        Kind::Skip => return Ok(TokenStream::new()),
        Kind::Subsection => {
            let needed = match &entry.needed {
                Some(path) => quote! {
                    ::core::option::Option::Some({
                        let needed: fn(&Self) -> bool = #path;
                        needed
                    })
                },
                None => quote!(::core::option::Option::None),
            };
            return Ok(quote_spanned!(span=> .subsection(#at, #needed)));
        }
        Kind::Unused(bytes) => quote_spanned!(span=> .unused(#name, #bytes)),
        Kind::Tmp(view) => quote_spanned!(span=> .tmp::<#view>(#name)),
        Kind::Buffer | Kind::Bitmap => {
            let is_bitmap = matches!(entry.kind, Kind::Bitmap);
            check_items(field, entry, if is_bitmap { "u64" } else { "u8" })?;
            let method = format_ident!("{}", entry.word, span = span);
            let number = length(field, entry, is_bitmap)?;
            quote_spanned!(span=> .#method #ty(#name, #at, #number))
        }
        Kind::List => {
            let (kind, max) = (
                format_ident!("{}", entry.word.to_string().to_uppercase()),
                &entry.max,
            );
            quote_spanned!(span=> .list #ty(#name, ::vmferry_vmstate::FieldType::#kind, #at, #max))
        }
        Kind::Tree => {
            let (key, max) = (tree_key(entry), &entry.max);
            quote_spanned!(span=> .tree(#name, #key, #at, #max))
        }
        Kind::Codec(_) | Kind::Custom(_) | Kind::Struct | Kind::VStruct(_) => {
            let element = element(field, entry);
            let many = if entry.nullable { "nullable" } else { "many" };
            let many = format_ident!("{many}", span = span);
            match elements(field, entry)? {
                Some(number) => quote_spanned!(span=> .#many #ty(#name, #element, #at, #number)),
                None => quote_spanned!(span=> .single #ty(#name, #element, #at)),
            }
        }
    };
    let since = entry.since.iter().map(|version| quote!(.since(#version)));
    let condition = entry.condition.iter();
    let condition = condition.map(|path| quote_spanned!(path.span()=> .condition(#path)));
    Ok(quote!(#call #(#since)* #(#condition)*))
}

/// `fn(&mut Self) -> &mut F`
fn accessor(field: &Described<'_>, entry: &Entry) -> TokenStream {
    let ident = field.ident;
    if let Some(at) = &entry.at {
        let place = place(at);
        return quote!(|state| &mut #place);
    }
    let shape = shape_of(field, entry);
    match shape.lengths.len() {
        0 if argument(field.ty, "Box").is_some() && !is_sequence(entry) => {
            quote_spanned!(ident.span()=> |state| &mut *state.#ident)
        }
        0 => quote_spanned!(ident.span()=> |state| &mut state.#ident),
        depth => {
            let flatten = (1..depth).map(|_| quote!(.as_flattened_mut()));
            quote_spanned!(ident.span()=> |state| state.#ident.as_mut_slice() #(#flatten)*)
        }
    }
}

/// The place that `at` says, of which only fixed arrays are indexed: a `Vec` may be shorter than the
/// index when a stream has said its length.
fn place(at: &Expr) -> TokenStream {
    match at {
        Expr::Field(field) => {
            let (base, member) = (place(&field.base), &field.member);
            quote!(#base.#member)
        }
        Expr::Index(index) => {
            let (base, number) = (place(&index.expr), &index.index);
            let known = quote!({ #number });
            quote_spanned! {index.expr.span()=>
                ::vmferry_vmstate::fixed_array::<#known, _>(&mut #base)[#number]
            }
        }
        first => quote_spanned!(first.span()=> state.#first),
    }
}

/// The field's type as the entry sees it: a format of its own takes an array whole.
fn shape_of<'a>(field: &Described<'a>, entry: &Entry) -> Shape<'a> {
    let is_counted = entry.count.is_some() || entry.nullable;
    match entry.kind {
        Kind::Custom(_) if !is_counted => Shape {
            lengths: Vec::new(),
            item: field.ty,
        },
        _ => Shape::of(field.ty),
    }
}

/// The type that the accessor leads to, so that an error about it names it.
fn holder(field: &Described<'_>, entry: &Entry) -> TokenStream {
    let shape = shape_of(field, entry);
    if entry.at.is_some() || entry.nullable {
        return TokenStream::new();
    }
    let item = shape.item;
    let boxed = argument(field.ty, "Box").filter(|_| !is_sequence(entry));
    let ty = match boxed {
        Some(inner) => quote!(#inner),
        None if shape.is_array() => quote_spanned!(item.span()=> [#item]),
        None => quote!(#item),
    };
    quote_spanned!(item.span()=> ::<#ty>)
}

/// A field without an array type that still holds several elements.
fn is_sequence(entry: &Entry) -> bool {
    entry.count.is_some() || matches!(entry.kind, Kind::Buffer | Kind::Bitmap)
}

/// The element of a field, with its conversion.
fn element(field: &Described<'_>, entry: &Entry) -> TokenStream {
    let span = entry.word.span();
    let plain = match &entry.kind {
        Kind::Codec(codec) => {
            let codec = format_ident!("{codec}", span = span);
            quote_spanned!(span=> ::vmferry_vmstate::Plain(::vmferry_vmstate::wire::#codec))
        }
        Kind::Custom(codec) => quote_spanned!(codec.span()=> ::vmferry_vmstate::Plain(#codec)),
        Kind::VStruct(version) => quote_spanned!(span=> ::vmferry_vmstate::VStruct(#version)),
        _ => quote_spanned!(span=> ::vmferry_vmstate::Struct),
    };
    let converted = match &entry.conversion {
        None => plain,
        Some(Conversion::As(wire)) => quote_spanned! {wire.span()=>
            ::vmferry_vmstate::Converted::by_try_into(
                #plain,
                ::core::marker::PhantomData::<#wire>,
            )
        },
        Some(Conversion::With(module)) => quote_spanned! {module.span()=>
            ::vmferry_vmstate::Converted::new(
                #plain,
                |value| {
                    let to_wire: fn(&_) -> ::core::result::Result<_, _> = #module::to_wire;
                    to_wire(value).map_err(::core::convert::Into::into)
                },
                |wire| {
                    let from_wire: fn(_) -> ::core::result::Result<_, _> = #module::from_wire;
                    from_wire(wire).map_err(::core::convert::Into::into)
                },
            )
        },
    };
    let shape = shape_of(field, entry);
    let item = match argument(shape.item, "Vec") {
        Some(item) if entry.count.is_some() => item,
        _ => shape.item,
    };
    let item = match argument(item, "Option") {
        Some(item) if entry.nullable => item,
        _ => item,
    };
    let several = shape.is_array() || entry.count.is_some();
    let boxed = argument(item, "Box").filter(|inner| !matches!(inner, Type::Slice(_)));
    if several && boxed.is_some() && entry.at.is_none() {
        return quote_spanned!(span=> ::vmferry_vmstate::Boxed(#converted));
    }
    converted
}

fn tree_key(entry: &Entry) -> TokenStream {
    if entry.struct_key {
        quote!(::vmferry_vmstate::Struct)
    } else {
        quote!(::vmferry_vmstate::Plain(::vmferry_vmstate::wire::Uint64))
    }
}

/// How many elements, `None` for a single value.
fn elements(field: &Described<'_>, entry: &Entry) -> Result<Option<TokenStream>> {
    if let Some(number) = &entry.count {
        return counted(field, entry, number, "count").map(Some);
    }
    let lengths = array_lengths(field, entry);
    if entry.nullable && lengths.is_none() {
        let text = "`nullable` is for arrays: write `count = FIELD, max = 64` for a `Vec`";
        return Err(Error::new(entry.word.span(), text));
    }
    let slice = argument(field.ty, "Box").is_some_and(|inner| matches!(inner, Type::Slice(_)));
    let unsized_ = slice || argument(field.ty, "Vec").is_some();
    if lengths.is_none() && entry.at.is_none() && unsized_ {
        let text = format!(
            "how many elements has `{0}`? write `{1}, count = FIELD, max = 64`, or `{1}, count = 16` \
             if there are always so many",
            field.ident, entry.word
        );
        return Err(Error::new(entry.word.span(), text));
    }
    Ok(lengths)
}

/// How many bytes of a buffer or bits of a bitmap.
fn length(field: &Described<'_>, entry: &Entry, is_bitmap: bool) -> Result<TokenStream> {
    if let Some(number) = &entry.count {
        return counted(field, entry, number, "length");
    }
    match array_lengths(field, entry) {
        Some(words) if is_bitmap => Ok(quote!((#words) * 64)),
        Some(bytes) => Ok(bytes),
        None => {
            let text = format!(
                "how long is `{0}`? write `{1}, length = FIELD, max = 4096`, or `{1}, length = 16` \
                 if it is always so long",
                field.ident, entry.word
            );
            Err(Error::new(entry.word.span(), text))
        }
    }
}

/// Bytes and words are known by their names, so that a wrong one is told what to be.
fn check_items(field: &Described<'_>, entry: &Entry, wanted: &str) -> Result<()> {
    let item = shape_of(field, entry).item;
    let item = argument(item, "Vec").unwrap_or(item);
    let found = item.to_token_stream().to_string();
    if entry.at.is_some() || found == wanted || word::of_rust_type(&found).is_none() {
        return Ok(());
    }
    let what = match entry.kind {
        Kind::Bitmap => "words of 64 bits",
        _ => "bytes",
    };
    let text = format!(
        "a `{}` holds {what}: make it `{wanted}`, not `{found}`",
        entry.word
    );
    Err(Error::new(item.span(), text))
}

/// Elements of the field's array, if it is one.
fn array_lengths(field: &Described<'_>, entry: &Entry) -> Option<TokenStream> {
    let shape = shape_of(field, entry);
    let lengths = shape.lengths.into_iter().filter(|_| entry.at.is_none());
    let lengths = lengths.map(ToTokens::to_token_stream);
    lengths.reduce(|product, length| quote!((#product) * (#length)))
}

fn counted(
    field: &Described<'_>,
    entry: &Entry,
    number: &Number,
    key: &str,
) -> Result<TokenStream> {
    let read = match number {
        Number::Constant(constant) => {
            let block = match constant {
                Expr::Block(block) => block.to_token_stream(),
                other => quote!({ #other }),
            };
            return Ok(quote_spanned! {constant.span()=>
                ::vmferry_vmstate::Number::<Self>::Fixed(const #block)
            });
        }
        Number::Field(counter) => quote_spanned! {counter.span()=>
            |state| ::vmferry_vmstate::count_of(state.#counter)
        },
        Number::Function(path) => quote_spanned! {path.span()=>
            |state| {
                let count: fn(&Self) -> _ = #path;
                ::vmferry_vmstate::count_of(count(state))
            }
        },
    };
    let bits = matches!(entry.kind, Kind::Bitmap).then(|| quote!(*64));
    let max = match (&entry.max, array_lengths(field, entry)) {
        (Some(max), _) => quote!(#max),
        (None, Some(room)) if bits.is_some() => quote!((#room) #bits),
        (None, Some(room)) => room,
        (None, None) => {
            let text = format!(
                "the stream says the {key} of `{}`, so it needs a maximum: add `max = 64`",
                field.ident
            );
            return Err(Error::new(entry.word.span(), text));
        }
    };
    Ok(quote!(::vmferry_vmstate::Number::<Self>::counted(#read, #max)))
}
