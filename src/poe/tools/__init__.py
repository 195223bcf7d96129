"""Function calling at run time."""
