"""A compact set in the formats of others."""
