"""The commands of the console script, one function for each; heavy modules are imported when a command runs."""
