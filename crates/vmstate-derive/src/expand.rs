//! From attributes to calls on a `Table`.

use proc_macro2::{Group, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Field, Fields, Ident, Result, Type};

use crate::Errors;
use crate::attribute;
use crate::entry::{Entry, Kind, Number};
use crate::owner::{HOOKS, Owner};
use crate::rust_type::{Shape, argument, usual_word};
use crate::value::call;

/// A field with what is said about it.
pub(crate) struct Described<'a> {
    pub(crate) ident: &'a Ident,
    pub(crate) ty: &'a Type,
    pub(crate) entries: Vec<Entry>,
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
                let known = check_counter(counter, field, &fields[..k], &fields[k..]);
                if errors.take(known).is_none() {
                    continue;
                }
            }
            calls.extend(errors.take(call(field, entry)));
            checks.extend(check(field, entry, &owner));
            checks.extend(check_since(entry, &owner));
        }
    }
    errors.finish()?;
    checks.extend(check_minimum(&owner));
    checks.extend(check_siblings(&fields, &owner));
    for view in &owner.subsections {
        calls.push(quote_spanned!(view.span()=> .view_subsection::<#view>()));
        checks.push(check_subsection(view, &owner));
    }
    let tokens = implementation(&input.ident, &owner, &calls, &checks);
    Ok(match &owner.library {
        Some(path) => with_library(tokens, &path.to_token_stream()),
        None => tokens,
    })
}

/// The tokens with another path in the place of `::vmferry_vmstate`.
fn with_library(tokens: TokenStream, library: &TokenStream) -> TokenStream {
    let mut out: Vec<TokenTree> = Vec::new();
    for token in tokens {
        let is_colon = |tree: &TokenTree| matches!(tree, TokenTree::Punct(p) if p.as_char() == ':');
        match token {
            TokenTree::Ident(ident) if ident == "vmferry_vmstate" => {
                let colons = out.iter().rev().take_while(|tree| is_colon(tree)).count();
                out.truncate(out.len() - colons.min(2));
                let path = library.clone().into_iter().map(|mut token| {
                    token.set_span(ident.span());
                    token
                });
                out.extend(path);
            }
            TokenTree::Group(group) => {
                let mut inner =
                    Group::new(group.delimiter(), with_library(group.stream(), library));
                inner.set_span(group.span());
                out.push(inner.into());
            }
            other => out.push(other),
        }
    }
    out.into_iter().collect()
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
    let needed = owner
        .needed
        .iter()
        .map(|path| quote_spanned!(path.span()=> .needed(#path)));
    let hooks = HOOKS.iter().zip(&owner.hooks).filter_map(|(name, path)| {
        let path = path.as_ref()?;
        let name = format_ident!("{name}", span = path.span());
        Some(quote!(.#name(#path)))
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
                ::vmferry_vmstate::Table::once(&TABLE, || {
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
        .map(|(span, items)| Entry::parse(span, &items, &owner.version))
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
            let text = format!("there is no version {} of it", version.to_token_stream());
            let version = version.outside(&owner.ident);
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

/// A name that begins with one before it would be read as that one, or as a subsection of it.
fn check_siblings(fields: &[Described<'_>], owner: &Owner) -> Vec<TokenStream> {
    let fields = fields.iter().flat_map(|field| {
        let is_subsection = |entry: &&Entry| matches!(entry.kind, Kind::Subsection);
        let here = field.entries.iter().filter(is_subsection);
        let here = here.filter(|entry| entry.at.is_none());
        here.map(|_| argument(field.ty, "Box").unwrap_or(field.ty))
    });
    let all: Vec<_> = fields.chain(&owner.subsections).collect();
    let mut checks = Vec::new();
    for (k, ty) in all.iter().enumerate() {
        for before in &all[..k] {
            checks.push(quote_spanned! {ty.span()=>
                const _: () = ::core::assert!(
                    !::vmferry_vmstate::begins_with(
                        <#ty as ::vmferry_vmstate::VmState>::NAME,
                        <#before as ::vmferry_vmstate::VmState>::NAME,
                    ),
                    "the name of this subsection begins with that of one before: it would be read \
                     as the other, or as a part of it"
                );
            });
        }
    }
    checks
}

/// Versions that the macro sees as numbers were compared before.
fn check_since(entry: &Entry, owner: &Owner) -> Option<TokenStream> {
    let since = entry.since.as_ref()?;
    let is_known = since.known.is_some() && owner.version.known.is_some();
    let (ident, since) = (&owner.ident, since.outside(&owner.ident));
    (!is_known).then(|| {
        quote_spanned! {since.span()=>
            const _: () = ::core::assert!(
                #since <= <#ident as ::vmferry_vmstate::VmState>::VERSION,
                "`since` is above the version of the struct"
            );
        }
    })
}

fn check_minimum(owner: &Owner) -> Option<TokenStream> {
    let (ident, minimum) = (&owner.ident, &owner.minimum_version);
    let is_known = minimum.known.is_some() && owner.version.known.is_some();
    (!is_known).then(|| {
        quote_spanned! {minimum.span()=>
            const _: () = ::core::assert!(
                <#ident as ::vmferry_vmstate::VmState>::MINIMUM_VERSION
                    <= <#ident as ::vmferry_vmstate::VmState>::VERSION,
                "the minimum version is above the version"
            );
        }
    })
}

fn check_subsection(ty: &Type, owner: &Owner) -> TokenStream {
    let name = &owner.name;
    let text = format!(
        "the name of a subsection must begin with its owner's and go on, such as `{}/more`",
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

#[cfg(test)]
mod tests {
    use syn::parse_quote;

    use super::*;

    #[test]
    fn the_library_is_where_it_is_said_to_be() {
        let everything = |library: TokenStream| {
            let input = parse_quote! {
                #[vmstate(
                    name = "a", version = NOW, minimum_version = OLD, needed = Self::needed,
                    post_load = Self::check, subsections(View) #library
                )]
                struct All {
                    #[vmstate(uint8, at = list[1].value, condition = Self::is_there)]
                    #[vmstate(uint8_equal, as = u8, since = OLD)]
                    first: u16,
                    #[vmstate(uint8, count = first, max = 4)]
                    counted: Vec<u8>,
                    #[vmstate(struct, nullable, with = module)]
                    list: [Option<Box<Inner>>; 4],
                    #[vmstate(vstruct = 2)]
                    boxed: [Box<Inner>; 4],
                    #[vmstate(gtree, max = 4)]
                    tree: std::collections::BTreeMap<u64, Inner>,
                    #[vmstate(qlist, max = 4)]
                    queue: Vec<Inner>,
                    #[vmstate(buffer, length = Self::length, max = 4)]
                    bytes: Vec<u8>,
                    #[vmstate(bitmap, length = 64)]
                    bits: Vec<u64>,
                    #[vmstate(tmp = View)]
                    view: u8,
                    #[vmstate(subsection)]
                    more: More,
                    #[vmstate(subsection)]
                    most: Most,
                }
            };
            derive(&input).unwrap().to_string()
        };
        let usual = everything(TokenStream::new());
        let renamed = everything(quote!(, crate = crate::device::state));
        assert!(usual.matches(":: vmferry_vmstate").count() > 40);
        assert!(!renamed.contains("vmferry_vmstate"));
        assert_eq!(
            renamed.replace("crate :: device :: state", ":: vmferry_vmstate"),
            usual
        );
    }
}
