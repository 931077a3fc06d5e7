"""What a selection is measured against, and how."""
