"""The report on a compact set: one HTML file that shows what was kept, what was left, and what looks wrong."""
