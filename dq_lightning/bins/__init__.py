"""Station 2: features to bins. Pure."""
