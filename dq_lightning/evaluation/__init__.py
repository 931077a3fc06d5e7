"""Baselines that a selection is compared with."""
