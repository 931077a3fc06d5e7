"""The flow from a dataset to its compact set."""
