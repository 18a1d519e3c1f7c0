"""The built-in passes, one file or folder each; found through the entry-point group `graphopt.passes`."""
