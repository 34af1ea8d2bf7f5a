//! What can hold the elements of an array.

/// A run of elements: an array, a slice, a box of one, or a [`Vec`].
///
/// An array that is counted by a field may have room for more than are sent; a `Vec` has as many as
/// the field says.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not hold several elements",
    label = "`count`, `length` and `nullable` are for `[T; N]`, `Box<[T]>` and `Vec<T>`"
)]
pub trait Sequence: 'static {
    /// An element.
    type Item: 'static;

    /// Elements that there is memory for already.
    fn held(&self) -> usize;

    /// The elements that are sent, if there are `count`.
    fn counted(&mut self, count: usize) -> Option<&mut [Self::Item]>;

    /// Make room and give the first `count`; `None` if there is no room for so many. `count` was
    /// compared with its maximum before.
    fn resized(&mut self, count: usize) -> Option<&mut [Self::Item]>;
}

impl<T: 'static> Sequence for [T] {
    type Item = T;

    fn held(&self) -> usize {
        self.len()
    }

    fn counted(&mut self, count: usize) -> Option<&mut [T]> {
        self.get_mut(..count)
    }

    fn resized(&mut self, count: usize) -> Option<&mut [T]> {
        self.get_mut(..count)
    }
}

impl<T: 'static, const N: usize> Sequence for [T; N] {
    type Item = T;

    fn held(&self) -> usize {
        N
    }

    fn counted(&mut self, count: usize) -> Option<&mut [T]> {
        self.get_mut(..count)
    }

    fn resized(&mut self, count: usize) -> Option<&mut [T]> {
        self.get_mut(..count)
    }
}

impl<S: Sequence + ?Sized> Sequence for Box<S> {
    type Item = S::Item;

    fn held(&self) -> usize {
        (**self).held()
    }

    fn counted(&mut self, count: usize) -> Option<&mut [S::Item]> {
        (**self).counted(count)
    }

    fn resized(&mut self, count: usize) -> Option<&mut [S::Item]> {
        (**self).resized(count)
    }
}

impl<T: Default + 'static> Sequence for Vec<T> {
    type Item = T;

    fn held(&self) -> usize {
        self.len()
    }

    fn counted(&mut self, count: usize) -> Option<&mut [T]> {
        (self.len() == count).then_some(self)
    }

    fn resized(&mut self, count: usize) -> Option<&mut [T]> {
        self.resize_with(count, T::default);
        Some(self)
    }
}

/// An array whose length no stream can change: what `at` may index.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "`at` cannot index a `{Self}`: only arrays always have such an element",
    label = "this is no `[T; N]`",
    note = "make it an array, or send the element as a field of its own"
)]
pub trait FixedArray {
    /// Its elements.
    const LENGTH: usize;
}

impl<T, const N: usize> FixedArray for [T; N] {
    const LENGTH: usize = N;
}

impl<A: FixedArray + ?Sized> FixedArray for Box<A> {
    const LENGTH: usize = A::LENGTH;
}

/// The same array, which has an element `INDEX`. The derive asks for it before it indexes.
///
/// ```compile_fail,E0080
/// #[derive(vmferry_vmstate::VmState)]
/// #[vmstate(name = "timer", version = 1)]
/// struct Timer {
///     #[vmstate(uint8, at = pairs[0][2])]
///     #[vmstate(skip = "sent in part")]
///     pairs: [[u8; 2]; 2],
/// }
///
/// println!("{:?}", <Timer as vmferry_vmstate::VmState>::description());
/// ```
#[doc(hidden)]
pub fn fixed_array<const INDEX: usize, A: FixedArray + ?Sized>(array: &mut A) -> &mut A {
    const { assert!(INDEX < A::LENGTH, "`at` indexes an array behind its end") };
    array
}
