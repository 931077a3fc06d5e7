"""Station 4 of the method: decides which patches of an image are kept, and fills the others."""
