"""The demo of the console script, with its bundled images."""
