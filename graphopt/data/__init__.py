"""Data sets and loaders: which images there are, how they are transformed, and in what order they come."""
