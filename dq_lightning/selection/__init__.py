"""Station 3: makes a selection from bins. All functions are pure."""
