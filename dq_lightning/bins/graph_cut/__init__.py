"""Exact greedy graph cut of groups of any size."""
