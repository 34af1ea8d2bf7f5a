//! From attributes to calls on a `Table`.

use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{
    Data, DeriveInput, Error, Expr, Field, Fields, GenericArgument, Ident, PathArguments, Result,
    Type,
};

use crate::Errors;
use crate::attribute;
use crate::entry::{Conversion, Entry, Kind, Number};
use crate::owner::{HOOKS, Owner};
use crate::word;

/// A field with what is said about it.
struct Described<'a> {
    ident: &'a Ident,
    ty: &'a Type,
    entries: Vec<Entry>,
}

impl Described<'_> {
    fn is_skipped(&self) -> bool {
        let skip = |entry: &Entry| matches!(entry.kind, Kind::Skip);
        self.entries.iter().any(skip)
    }
}

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let fields = named_fields(input)?;
    let owner = Owner::parse(&input.ident, attribute::vmstate(&input.attrs)?)?;
    let mut errors = Errors::default();
    let fields: Vec<_> = fields
        .into_iter()
        .filter_map(|field| errors.take(described(field, &owner)))
        .collect();
    let mut calls = Vec::new();
    let mut checks = Vec::new();
    for (k, field) in fields.iter().enumerate() {
        if !field.is_skipped() {
            errors.take(check_recursion(field, &input.ident));
        }
        for entry in &field.entries {
            let number = entry.count.as_ref();
            if let Some(Number::Field(counter)) = number {
                errors.take(check_counter(counter, field, &fields[..k], &fields[k..]));
            }
            calls.extend(errors.take(call(field, entry)));
            checks.extend(check(field, entry, &owner));
        }
    }
    errors.finish()?;
    for view in &owner.subsections {
        calls.push(quote_spanned!(view.span()=> .view_subsection::<#view>()));
        checks.push(check_subsection(view, &owner));
    }
    Ok(implementation(&input.ident, &owner, &calls, &checks))
}

fn implementation(
    ident: &Ident,
    owner: &Owner,
    calls: &[TokenStream],
    checks: &[TokenStream],
) -> TokenStream {
    let Owner {
        name,
        version,
        minimum_version,
        ..
    } = owner;
    let unmigratable = owner.unmigratable.then(|| quote!(.unmigratable()));
    let needed = owner.needed.iter().map(|path| quote!(.needed(#path)));
    let hooks = HOOKS.iter().zip(&owner.hooks).filter_map(|(name, path)| {
        let (name, path) = (format_ident!("{name}"), path.as_ref()?);
        let version = (name == "post_load").then(|| quote!(, version));
        Some(quote! {
            .#name(|state #version| #path(state #version).map_err(::core::convert::Into::into))
        })
    });
    quote! {
        #[automatically_derived]
        impl ::vmferry_vmstate::VmState for #ident {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const MINIMUM_VERSION: u32 = #minimum_version;

            fn table() -> &'static ::vmferry_vmstate::Table<Self> {
                static TABLE: ::std::sync::OnceLock<::vmferry_vmstate::Table<#ident>> =
                    ::std::sync::OnceLock::new();
                TABLE.get_or_init(|| {
                    ::vmferry_vmstate::Table::<Self>::new(#name, #version, #minimum_version)
                        #(#calls)*
                        #unmigratable
                        #(#needed)*
                        #(#hooks)*
                })
            }
        }
        #(#checks)*
    }
}

/// The fields of a struct that can be described.
fn named_fields(input: &DeriveInput) -> Result<Vec<&Field>> {
    let ident = &input.ident;
    if !input.generics.params.is_empty() {
        return Err(Error::new(
            input.generics.span(),
            "a description belongs to one type: `VmState` cannot be derived for generics",
        ));
    }
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => Ok(fields.named.iter().collect()),
            Fields::Unit => Ok(Vec::new()),
            Fields::Unnamed(_) => Err(Error::new(
                ident.span(),
                "fields are described by name: make it a struct with named fields",
            )),
        },
        Data::Enum(_) | Data::Union(_) => Err(Error::new(
            ident.span(),
            "only structs are described: send an enum as an integer, \
             with `#[vmstate(uint8, as = u8)]` on the field that holds it",
        )),
    }
}

fn described<'a>(field: &'a Field, owner: &Owner) -> Result<Described<'a>> {
    let Some(ident) = &field.ident else {
        return Err(Error::new(field.span(), "a field without a name"));
    };
    let entries: Result<Vec<_>> = attribute::vmstate(&field.attrs)?
        .into_iter()
        .map(|(span, items)| Entry::parse(span, &items, owner.version))
        .collect();
    let entries = entries?;
    if !entries.iter().any(Entry::settles_field) {
        return Err(Error::new(
            ident.span(),
            format!(
                "field `{ident}` is neither saved nor skipped: write #[vmstate({})] (or another \
                 type) or #[vmstate(skip = \"why\")]",
                usual_word(&field.ty)
            ),
        ));
    }
    let sent = entries
        .iter()
        .find(|entry| entry.settles_field() && !matches!(entry.kind, Kind::Skip));
    let sent = sent.map(|sent| (sent.word.span(), sent.at.is_some()));
    let field = Described {
        ident,
        ty: &field.ty,
        entries,
    };
    match sent {
        Some((span, false)) if field.is_skipped() => Err(Error::new(
            span,
            format!("field `{ident}` is saved and skipped: remove one of the two"),
        )),
        _ => Ok(field),
    }
}

/// A description that holds itself would never end.
fn check_recursion(field: &Described<'_>, owner: &Ident) -> Result<()> {
    let item = Shape::of(field.ty).item;
    let names = ["Vec", "VecDeque", "LinkedList", "Option", "Box"];
    let inner = |ty| names.iter().find_map(|name| argument(ty, name));
    let innermost = std::iter::successors(Some(item), |ty| inner(ty)).last();
    match innermost {
        Some(Type::Path(path)) if path.path.is_ident(owner) || path.path.is_ident("Self") => {
            let text = format!("`{owner}` cannot hold itself: its description would not end");
            Err(Error::new(field.ident.span(), text))
        }
        _ => Ok(()),
    }
}

/// The word that fits a type, for the error that asks for one.
fn usual_word(ty: &Type) -> &'static str {
    let ty = Shape::of(ty);
    let item = ty.item.to_token_stream().to_string();
    match item.as_str() {
        "u8" if ty.is_array() => "buffer",
        "Option < u64 >" => "timer",
        rust => word::of_rust_type(rust).unwrap_or("uint32"),
    }
}

/// A counter is known before what it counts.
fn check_counter(
    counter: &Ident,
    counted: &Described<'_>,
    before: &[Described<'_>],
    from_here: &[Described<'_>],
) -> Result<()> {
    let is_counter = |field: &&Described<'_>| field.ident == counter;
    let text = if before.iter().any(|field| is_counter(&field)) {
        return Ok(());
    } else if let Some(later) = from_here.iter().find(is_counter) {
        if later
            .entries
            .iter()
            .all(|entry| matches!(entry.kind, Kind::Skip))
        {
            return Ok(());
        }
        format!(
            "`{counter}` comes after `{}`, which it counts: it must be sent before",
            counted.ident
        )
    } else {
        format!("there is no field `{counter}`; a function is written `Self::{counter}`")
    };
    Err(Error::new(counter.span(), text))
}

/// A field's type, taken apart.
struct Shape<'a> {
    /// Lengths of the array around the item, outermost first.
    lengths: Vec<&'a Expr>,
    item: &'a Type,
}

impl<'a> Shape<'a> {
    fn of(mut ty: &'a Type) -> Self {
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

    fn is_array(&self) -> bool {
        !self.lengths.is_empty()
    }
}

/// The argument of `Name<..>`, such as the `T` of `Box<T>`.
fn argument<'a>(ty: &'a Type, name: &str) -> Option<&'a Type> {
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

/// The call that adds one value to the table.
fn call(field: &Described<'_>, entry: &Entry) -> Result<TokenStream> {
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
                Some(path) => quote!(::core::option::Option::Some(#path)),
                None => quote!(::core::option::Option::None),
            };
            return Ok(quote_spanned!(span=> .subsection(#at, #needed)));
        }
        Kind::Unused(bytes) => quote_spanned!(span=> .unused(#name, #bytes)),
        Kind::Tmp(view) => quote_spanned!(span=> .tmp::<#view>(#name)),
        Kind::Buffer | Kind::Bitmap => {
            let is_bitmap = matches!(entry.kind, Kind::Bitmap);
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
    let since = entry.since.map(|version| quote!(.since(#version)));
    let condition = entry.condition.iter().map(|path| quote!(.condition(#path)));
    Ok(quote!(#call #since #(#condition)*))
}

/// `fn(&mut Self) -> &mut F`
fn accessor(field: &Described<'_>, entry: &Entry) -> TokenStream {
    let ident = field.ident;
    if let Some(at) = &entry.at {
        return quote!(|state| &mut state.#at);
    }
    let shape = Shape::of(field.ty);
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

/// The type that the accessor leads to, so that an error about it names it.
fn holder(field: &Described<'_>, entry: &Entry) -> TokenStream {
    let shape = Shape::of(field.ty);
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
                |value| #module::to_wire(value).map_err(::core::convert::Into::into),
                |wire| #module::from_wire(wire).map_err(::core::convert::Into::into),
            )
        },
    };
    let shape = Shape::of(field.ty);
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

/// Elements of the field's array, if it is one.
fn array_lengths(field: &Described<'_>, entry: &Entry) -> Option<TokenStream> {
    let shape = Shape::of(field.ty);
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
        Number::Literal(literal) => return Ok(quote!(#literal)),
        Number::Field(counter) => quote_spanned! {counter.span()=>
            |state| ::vmferry_vmstate::count_of(state.#counter)
        },
        Number::Function(path) => quote_spanned! {path.span()=>
            |state| ::vmferry_vmstate::count_of(#path(state))
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

/// What only the compiler knows: names and versions of other types.
fn check(field: &Described<'_>, entry: &Entry, owner: &Owner) -> Option<TokenStream> {
    let ty = argument(field.ty, "Box").unwrap_or(field.ty);
    match &entry.kind {
        Kind::Subsection if entry.at.is_none() => Some(check_subsection(ty, owner)),
        Kind::VStruct(version) if entry.at.is_none() && entry.conversion.is_none() => {
            let item = Shape::of(ty).item;
            let item = argument(item, "Vec").unwrap_or(item);
            let item = argument(item, "Option").unwrap_or(item);
            let item = argument(item, "Box").unwrap_or(item);
            let text = format!("there is no version {version} of it");
            Some(quote_spanned! {entry.word.span()=>
                const _: () = ::core::assert!(
                    <#item as ::vmferry_vmstate::VmState>::MINIMUM_VERSION <= #version
                        && #version <= <#item as ::vmferry_vmstate::VmState>::VERSION,
                    #text
                );
            })
        }
        _ => None,
    }
}

fn check_subsection(ty: &Type, owner: &Owner) -> TokenStream {
    let name = &owner.name;
    let text = format!(
        "the name of a subsection must begin with `{}/`",
        name.value()
    );
    quote_spanned! {ty.span()=>
        const _: () = ::core::assert!(
            ::vmferry_vmstate::is_subsection_of(
                <#ty as ::vmferry_vmstate::VmState>::NAME,
                #name,
            ),
            #text
        );
    }
}
