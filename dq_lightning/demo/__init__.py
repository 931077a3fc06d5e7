"""The demo of the console script, and the images that it uses."""
