//! `#[vmstate(word, key = value, key(value))]`, before anything is known about the words.

use proc_macro2::{Span, TokenStream};
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Error, Expr, ExprLit, ExprPath, Ident, Lit, LitStr, Result, Token, Type,
    parenthesized,
};

/// One word of an attribute, with its value.
pub(crate) struct Item {
    pub(crate) key: Ident,
    pub(crate) value: Value,
}

pub(crate) enum Value {
    None,
    Expr(Expr),
    Type(Type),
    Types(Vec<Type>),
    Word(Ident),
}

/// A version.
#[derive(Clone)]
pub(crate) struct Version {
    /// If it is a plain number.
    pub(crate) known: Option<u32>,
    expr: Expr,
}

impl Version {
    /// For code outside of the `impl`, where `Self` has no meaning.
    pub(crate) fn outside(&self, owner: &Ident) -> Expr {
        let mut expr = self.expr.clone();
        if let Expr::Path(path) = &mut expr
            && let Some(first) = path.path.segments.first_mut()
            && first.ident == "Self"
        {
            first.ident = Ident::new(&owner.to_string(), first.ident.span());
        }
        expr
    }
}

impl ToTokens for Version {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        self.expr.to_tokens(tokens);
    }
}

/// Is it written like a constant?
pub(crate) fn is_constant(path: &syn::Path) -> bool {
    let last = path.segments.last().map(|last| last.ident.to_string());
    last.is_some_and(|last| !last.chars().any(char::is_lowercase))
}

/// Keys whose value is a type.
const TYPES: [&str; 2] = ["as", "tmp"];

impl Parse for Item {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let key = Ident::parse_any(input)?;
        let value = if input.peek(Token![=]) {
            input.parse::<Token![=]>()?;
            if TYPES.iter().any(|name| key == name) {
                Value::Type(input.parse()?)
            } else if key == "key" {
                // `struct` is a word of ours and a keyword of Rust.
                Value::Word(Ident::parse_any(input)?)
            } else {
                Value::Expr(input.parse()?)
            }
        } else if input.peek(syn::token::Paren) {
            let content;
            parenthesized!(content in input);
            if key == "subsections" {
                let types = Punctuated::<Type, Token![,]>::parse_terminated(&content)?;
                Value::Types(types.into_iter().collect())
            } else {
                Value::Expr(content.parse()?)
            }
        } else {
            Value::None
        };
        Ok(Self { key, value })
    }
}

/// The words of each `#[vmstate(..)]` among `attributes`, with the place of the attribute.
pub(crate) fn vmstate(attributes: &[Attribute]) -> Result<Vec<(Span, Vec<Item>)>> {
    let ours = attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("vmstate"));
    ours.map(|attribute| {
        let items = attribute.parse_args_with(Punctuated::<Item, Token![,]>::parse_terminated)?;
        let span = attribute
            .path()
            .get_ident()
            .map_or_else(Span::call_site, Ident::span);
        Ok((span, items.into_iter().collect()))
    })
    .collect()
}

impl Item {
    /// A word that stands alone.
    pub(crate) fn flag(&self) -> Result<()> {
        match self.value {
            Value::None => Ok(()),
            _ => Err(self.error(format!("`{}` takes no value", self.key))),
        }
    }

    /// A text that is not empty.
    pub(crate) fn text(&self) -> Result<LitStr> {
        match &self.value {
            Value::Expr(Expr::Lit(ExprLit {
                lit: Lit::Str(text),
                ..
            })) => Ok(text.clone()),
            _ => Err(self.error(format!("write `{} = \"..\"`", self.key))),
        }
    }

    /// A version: a number or a constant.
    pub(crate) fn version(&self) -> Result<Version> {
        let known = match &self.value {
            Value::Expr(Expr::Lit(ExprLit {
                lit: Lit::Int(number),
                ..
            })) => Some(number.base10_parse()?),
            Value::Expr(Expr::Path(path)) if is_constant(&path.path) => None,
            _ => {
                let text = format!("write `{0} = 1` or `{0} = CONSTANT`", self.key);
                return Err(self.error(text));
            }
        };
        let expr = self.expr("version = 1")?;
        Ok(Version { known, expr })
    }

    /// A path to a function or module.
    pub(crate) fn path(&self, what: &str) -> Result<ExprPath> {
        match &self.value {
            Value::Expr(Expr::Path(path)) => Ok(path.clone()),
            _ => Err(self.error(format!("write `{} = PATH`, the path of {what}", self.key))),
        }
    }

    /// Any expression.
    pub(crate) fn expr(&self, example: &str) -> Result<Expr> {
        match &self.value {
            Value::Expr(expr) => Ok(expr.clone()),
            _ => Err(self.error(format!("write `{example}`"))),
        }
    }

    /// A type.
    pub(crate) fn ty(&self) -> Result<Type> {
        match &self.value {
            Value::Type(ty) => Ok(ty.clone()),
            _ => Err(self.error(format!("write `{} = TYPE`", self.key))),
        }
    }

    pub(crate) fn error(&self, text: impl std::fmt::Display) -> Error {
        Error::new(self.key.span(), text)
    }
}
