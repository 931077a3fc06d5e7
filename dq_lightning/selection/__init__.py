"""Station 3: bins to selection. Pure."""
