//! What stands on the struct itself: name, versions, hooks.

use proc_macro2::Span;
use syn::{Error, ExprPath, Ident, LitStr, Result, Type};

use crate::Errors;
use crate::attribute::{Item, Value, Version};
use crate::word;

/// Longest name that a subsection's length byte can say.
const MAX_NAME_BYTES: usize = 255;

const WORDS: [&str; 12] = [
    "name",
    "version",
    "minimum_version",
    "unmigratable",
    "needed",
    "pre_save",
    "post_save",
    "pre_load",
    "post_load",
    "committed",
    "subsections",
    "crate",
];

/// The hooks, in the order in which they run, and `needed`.
pub(crate) const HOOKS: [&str; 5] = [
    "pre_save",
    "post_save",
    "pre_load",
    "post_load",
    "committed",
];

/// The description of the struct.
pub(crate) struct Owner {
    pub(crate) ident: Ident,
    pub(crate) name: LitStr,
    pub(crate) version: Version,
    pub(crate) minimum_version: Version,
    pub(crate) unmigratable: bool,
    pub(crate) needed: Option<ExprPath>,
    /// By their place in [`HOOKS`].
    pub(crate) hooks: [Option<ExprPath>; 5],
    pub(crate) subsections: Vec<Type>,
    /// Where `vmferry_vmstate` is, if not there.
    pub(crate) library: Option<ExprPath>,
}

impl Owner {
    /// Read the attributes of a struct that is called `ident`.
    pub(crate) fn parse(ident: &Ident, attributes: Vec<(Span, Vec<Item>)>) -> Result<Self> {
        let mut errors = Errors::default();
        let mut name = None;
        let mut version = None;
        let mut minimum: Option<Version> = None;
        let mut unmigratable = false;
        let mut needed = None;
        let mut hooks = [const { None }; 5];
        let mut subsections = Vec::new();
        let mut library = None;
        let mut seen: Vec<String> = Vec::new();
        for item in attributes.into_iter().flat_map(|(_, items)| items) {
            let key = item.key.to_string();
            if seen.contains(&key) {
                errors.add(item.error(format!("`{key}` is said twice")));
            }
            match key.as_str() {
                "name" => name = errors.take(checked_name(&item)),
                "version" => version = errors.take(item.version()),
                "minimum_version" => minimum = errors.take(item.version()),
                "unmigratable" => unmigratable = errors.take(item.flag()).is_some(),
                "needed" => needed = errors.take(item.path("a `fn(&Self) -> bool`")),
                "crate" => library = errors.take(item.path("the crate vmferry-vmstate")),
                "subsections" => match item.value {
                    Value::Types(types) => subsections = types,
                    _ => errors.add(item.error("write `subsections(TYPE, ..)`")),
                },
                hook => match HOOKS.iter().position(|name| *name == hook) {
                    Some(place) => {
                        let what = if hook == "post_load" {
                            "a `fn(&mut Self, u32) -> Result<(), E>`"
                        } else {
                            "a `fn(&mut Self) -> Result<(), E>`"
                        };
                        hooks[place] = errors.take(item.path(what));
                    }
                    None => errors.add(item.error(word::unknown_of(hook, &WORDS))),
                },
            }
            seen.push(key);
        }
        for missing in ["name", "version"] {
            if !seen.iter().any(|key| key == missing) {
                errors.add(Error::new(
                    ident.span(),
                    format!(
                        "`{ident}` has no {missing}: write \
                         `#[vmstate(name = \"..\", version = 1)]` on the struct"
                    ),
                ));
            }
        }
        if let (Some(Some(version)), Some(minimum)) =
            (version.as_ref().map(|v: &Version| v.known), &minimum)
            && minimum.known.is_some_and(|least| least > version)
        {
            errors.add(Error::new_spanned(
                minimum,
                format!("the minimum version is above the version, {version}"),
            ));
        }
        errors.finish()?;
        let (Some(name), Some(version)) = (name, version) else {
            return Err(Error::new(ident.span(), "has no name or no version"));
        };
        Ok(Self {
            ident: ident.clone(),
            name,
            minimum_version: minimum.unwrap_or_else(|| version.clone()),
            version,
            unmigratable,
            needed,
            hooks,
            subsections,
            library,
        })
    }
}

/// A name that can stand in a stream.
pub(crate) fn checked_name(item: &Item) -> Result<LitStr> {
    let literal = item.text()?;
    let name = literal.value();
    let fault = if name.is_empty() {
        "a name cannot be empty"
    } else if name.len() > MAX_NAME_BYTES {
        "a name has at most 255 bytes"
    } else if !name.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        "a name is plain ASCII"
    } else {
        return Ok(literal);
    };
    Err(Error::new(literal.span(), fault))
}
