"""Converts rows of instruction data to token ids, label masks, batches and loaders."""
