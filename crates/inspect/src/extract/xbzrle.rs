//! Changes of a page.

/// Apply `encoded` to `page`: pairs of a run that stays and a run of new bytes.
pub(crate) fn apply(encoded: &[u8], page: &mut [u8]) -> Result<(), String> {
    let mut rest = encoded;
    let mut at = 0_usize;
    let mut first = true;
    while !rest.is_empty() {
        let skip = length(&mut rest)?;
        if skip == 0 && !first {
            return Err("an XBZRLE run of 0 bytes".into());
        }
        first = false;
        let count = length(&mut rest)?;
        if count == 0 {
            return Err("an XBZRLE run of 0 bytes".into());
        }
        let start = at.saturating_add(skip);
        let end = start.saturating_add(count);
        let (Some(from), Some(to)) = (rest.get(..count), page.get_mut(start..end)) else {
            return Err("an XBZRLE run past the end".into());
        };
        to.copy_from_slice(from);
        rest = rest.get(count..).unwrap_or_default();
        at = end;
    }
    Ok(())
}

fn length(rest: &mut &[u8]) -> Result<usize, String> {
    let (length, used) = match **rest {
        [low, ..] if low < 0x80 => (usize::from(low), 1),
        [low, high, ..] if high < 0x80 => (usize::from(low & 0x7f) | usize::from(high) << 7, 2),
        _ => return Err("an XBZRLE length is wrong".into()),
    };
    *rest = rest.get(used..).unwrap_or_default();
    Ok(length)
}
