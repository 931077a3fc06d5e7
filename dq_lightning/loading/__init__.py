"""What stands behind a data module: the training set, its preparation on all ranks, loaders."""
