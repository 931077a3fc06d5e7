"""Code that all other folders use: errors, records, settings, console, devices, isolation of the random state."""
