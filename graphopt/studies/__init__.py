"""Studies: many runs from one file, and runs compared."""
