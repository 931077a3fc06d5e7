"""The commands of the console script, one function each; heavy modules are imported when a command runs."""
