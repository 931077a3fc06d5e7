"""Second step of the method: make bins of features. The code takes tensors and returns tensors."""
