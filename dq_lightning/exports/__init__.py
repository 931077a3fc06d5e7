"""Writing a compact set in the file formats of other libraries."""
