"""Station 5: cache entries and packed stores on disk."""
