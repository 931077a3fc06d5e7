"""The cache on disk: entries with keys, manifests and locks, remembered digests, and shards of unfinished work."""
