"""The parts of a data module that need no Lightning: the training set, its preparation on all ranks, and loaders."""
