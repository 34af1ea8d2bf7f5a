//! What stands on a field: each attribute is one value on the wire, or says why there is none.

use proc_macro2::Span;
use syn::{Error, Expr, ExprLit, ExprPath, Ident, Lit, LitStr, Result, Type};

use crate::attribute::{Item, Value, Version, is_constant};
use crate::owner::checked_name;
use crate::word;

/// One `#[vmstate(..)]` of a field.
pub(crate) struct Entry {
    /// The word for its type.
    pub(crate) word: Ident,
    pub(crate) kind: Kind,
    pub(crate) name: Option<LitStr>,
    pub(crate) since: Option<Version>,
    pub(crate) condition: Option<ExprPath>,
    pub(crate) count: Option<Number>,
    pub(crate) max: Option<Expr>,
    pub(crate) nullable: bool,
    pub(crate) conversion: Option<Conversion>,
    /// Another place in the device than the field itself.
    pub(crate) at: Option<Expr>,
    pub(crate) struct_key: bool,
    pub(crate) needed: Option<ExprPath>,
}

/// How a value stands on the wire.
pub(crate) enum Kind {
    Codec(&'static str),
    Custom(Expr),
    Struct,
    VStruct(Version),
    Buffer,
    Bitmap,
    List,
    Tree,
    Tmp(Type),
    Unused(Expr),
    Subsection,
    Skip,
}

/// `count` or `length`.
pub(crate) enum Number {
    Field(Ident),
    Constant(Expr),
    Function(ExprPath),
}

/// `as` or `with`.
pub(crate) enum Conversion {
    As(Type),
    With(ExprPath),
}

impl Entry {
    pub(crate) fn parse(span: Span, items: &[Item], version: &Version) -> Result<Self> {
        let item = type_item(span, items)?;
        let mut entry = Self::of_type(item)?;
        let mut seen: Vec<&Ident> = Vec::new();
        for option in items {
            if seen.contains(&&option.key) {
                return Err(option.error(format!("`{}` is said twice", option.key)));
            }
            seen.push(&option.key);
            if !std::ptr::eq(option, item) {
                entry.option(option, version)?;
            }
        }
        entry.check()?;
        Ok(entry)
    }

    fn of_type(item: &Item) -> Result<Self> {
        let word = item.key.to_string();
        let plain = |kind| item.flag().map(|()| kind);
        let kind = match word.as_str() {
            "struct" => plain(Kind::Struct)?,
            "buffer" => plain(Kind::Buffer)?,
            "bitmap" => plain(Kind::Bitmap)?,
            "qtailq" | "qlist" => plain(Kind::List)?,
            "gtree" => plain(Kind::Tree)?,
            "subsection" => plain(Kind::Subsection)?,
            "vstruct" => Kind::VStruct(item.version()?),
            "tmp" => Kind::Tmp(item.ty()?),
            "custom" => Kind::Custom(item.expr("custom = CODEC")?),
            "unused" => Kind::Unused(item.expr("unused(BYTES)")?),
            "skip" => {
                let missing = "say why: write `skip = \"made anew by ..\"`";
                let reason = item.text().map_err(|_| item.error(missing))?;
                if reason.value().trim().is_empty() {
                    return Err(Error::new(reason.span(), missing));
                }
                Kind::Skip
            }
            codec => match word::codec(codec) {
                Some(codec) => plain(Kind::Codec(codec))?,
                None => return Err(item.error(word::unknown(codec))),
            },
        };
        Ok(Self {
            word: item.key.clone(),
            kind,
            name: None,
            since: None,
            condition: None,
            count: None,
            max: None,
            nullable: false,
            conversion: None,
            at: None,
            struct_key: false,
            needed: None,
        })
    }

    fn option(&mut self, item: &Item, version: &Version) -> Result<()> {
        let key = item.key.to_string();
        if !self.takes(&key) {
            return Err(item.error(format!("`{}` takes no `{key}`", self.word)));
        }
        match key.as_str() {
            "name" => self.name = Some(checked_name(item)?),
            "since" => {
                let since = item.version()?;
                if let (Some(since_known), Some(version)) = (since.known, version.known)
                    && since_known > version
                {
                    let text =
                        format!("the struct has version {version}: raise it to {since_known}");
                    return Err(Error::new_spanned(since, text));
                }
                self.since = Some(since);
            }
            "condition" => {
                self.condition = Some(item.path("a `fn(&Self, version: u32) -> bool`")?);
            }
            "count" | "length" => self.count = Some(number(item)?),
            "max" => self.max = Some(item.expr("max = 64")?),
            "nullable" => {
                item.flag()?;
                self.nullable = true;
            }
            "as" => self.conversion = Some(Conversion::As(item.ty()?)),
            "with" => {
                let what = "a module with `to_wire` and `from_wire`";
                self.conversion = Some(Conversion::With(item.path(what)?));
            }
            "at" => self.at = Some(place(item)?),
            "key" => match &item.value {
                Value::Word(word) if word == "struct" => self.struct_key = true,
                Value::Word(word) if word == "uint64" => {}
                _ => return Err(item.error("a key is `key = uint64` or `key = struct`")),
            },
            _ => self.needed = Some(item.path("a `fn(&Self) -> bool`")?),
        }
        Ok(())
    }

    /// Has an option a meaning for this type?
    fn takes(&self, option: &str) -> bool {
        let element = matches!(
            self.kind,
            Kind::Codec(_) | Kind::Custom(_) | Kind::Struct | Kind::VStruct(_)
        );
        let bytes = matches!(self.kind, Kind::Buffer | Kind::Bitmap);
        let list = matches!(self.kind, Kind::List | Kind::Tree);
        match option {
            "name" | "since" | "condition" => !matches!(self.kind, Kind::Skip | Kind::Subsection),
            "count" | "nullable" | "as" | "with" => element,
            "length" => bytes,
            "max" => element || bytes || list,
            "at" => element || bytes || list || matches!(self.kind, Kind::Subsection),
            "key" => matches!(self.kind, Kind::Tree),
            "needed" => matches!(self.kind, Kind::Subsection),
            _ => false,
        }
    }

    fn check(&self) -> Result<()> {
        let error = |text: String| Err(Error::new(self.word.span(), text));
        match self.kind {
            Kind::List | Kind::Tree if self.max.is_none() => error(format!(
                "`{0}` ends itself, so it needs a maximum: write `{0}, max = 64`",
                self.word
            )),
            Kind::Codec(_) | Kind::Custom(_) | Kind::Struct | Kind::VStruct(_)
                if self.max.is_some() && self.count.is_none() =>
            {
                error("`max` is for arrays with `count = FIELD`".into())
            }
            _ => Ok(()),
        }
    }

    /// Is it the field itself that is sent, or said to be not?
    pub(crate) fn settles_field(&self) -> bool {
        !matches!(self.kind, Kind::Unused(_))
    }
}

/// The one word of an attribute that names a type.
fn type_item(span: Span, items: &[Item]) -> Result<&Item> {
    let mut types = items
        .iter()
        .filter(|item| word::is_type(&item.key.to_string()));
    let Some(first) = types.next() else {
        let known = |item: &&Item| !word::OPTIONS.iter().any(|option| item.key == option);
        return Err(match items.iter().find(known) {
            Some(item) => item.error(word::unknown(&item.key.to_string())),
            None => Error::new(span, "how is it sent? begin with a type, such as `uint32`"),
        });
    };
    if let Some(second) = types.next() {
        let text = format!(
            "`{}` and `{}`: a value has one type; for two values, write two attributes",
            first.key, second.key
        );
        return Err(second.error(text));
    }
    let known = |item: &&Item| {
        let word = item.key.to_string();
        !word::is_type(&word) && !word::OPTIONS.contains(&word.as_str())
    };
    match items.iter().find(known) {
        Some(item) => Err(item.error(word::unknown(&item.key.to_string()))),
        None => Ok(first),
    }
}

/// Another place in the device: fields, and elements of arrays with a fixed number.
fn place(item: &Item) -> Result<Expr> {
    const EXAMPLE: &str = "at = channels[0].count";
    let place = item.expr(EXAMPLE)?;
    let mut rest = &place;
    loop {
        rest = match rest {
            Expr::Path(path) if path.path.get_ident().is_some() => return Ok(place),
            Expr::Field(field) => &field.base,
            Expr::Index(index) => match &*index.index {
                Expr::Lit(ExprLit {
                    lit: Lit::Int(_), ..
                }) => &index.expr,
                Expr::Path(path) if is_constant(&path.path) => &index.expr,
                other => {
                    let text = "an index is a number or a constant";
                    return Err(Error::new_spanned(other, text));
                }
            },
            _ => return Err(item.error(format!("write a place in the struct: `{EXAMPLE}`"))),
        };
    }
}

fn number(item: &Item) -> Result<Number> {
    let example = format!("{} = FIELD", item.key);
    match item.expr(&example)? {
        Expr::Path(path) if !is_constant(&path.path) => Ok(match path.path.get_ident() {
            Some(field) => Number::Field(field.clone()),
            None => Number::Function(path),
        }),
        Expr::Closure(_)
        | Expr::Lit(ExprLit {
            lit: Lit::Str(_) | Lit::Bool(_),
            ..
        }) => Err(item.error(format!(
            "write `{0} = FIELD`, `{0} = CONSTANT`, `{0} = 16` or `{0} = Self::function`",
            item.key
        ))),
        constant => Ok(Number::Constant(constant)),
    }
}
