"""Which samples are worth keeping: scores of their quality, and which of the worst are left out."""
