"""Entries on disk: keys, manifests, locks, digests, shards."""
