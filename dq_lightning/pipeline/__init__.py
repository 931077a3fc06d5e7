"""The steps from a dataset to its compact set, in order, each looked up in the cache before it is computed."""
