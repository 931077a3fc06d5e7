"""Station 1, images to features: encoders, how one is chosen, and the loop that runs it."""
