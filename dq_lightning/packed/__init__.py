"""The packed format, its writer and its reader."""
