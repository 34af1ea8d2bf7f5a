//! Aligned buffers with a byte budget, and the zero test.
