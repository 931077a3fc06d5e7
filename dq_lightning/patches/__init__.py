"""Station 4: which patches of an image are kept, and how the others are filled."""
