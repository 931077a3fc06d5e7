"""Adapters that present any dataset through one protocol, `base.Source`."""
