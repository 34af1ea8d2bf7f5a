//! `#[vmstate(word, key = value, key(value))]`, before anything is known about the words.

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Error, Expr, ExprLit, ExprPath, Ident, Lit, LitInt, LitStr, Result, Token, Type,
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

    /// A version: a plain number, for it is compared while compiling.
    pub(crate) fn version(&self) -> Result<(u32, LitInt)> {
        if let Value::Expr(Expr::Lit(ExprLit {
            lit: Lit::Int(number),
            ..
        })) = &self.value
        {
            return Ok((number.base10_parse()?, number.clone()));
        }
        Err(self.error(format!("write `{} = 1`, with a plain number", self.key)))
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
