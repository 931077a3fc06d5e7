"""Baselines that a selection is compared with, and measures of how diverse a selection is."""
