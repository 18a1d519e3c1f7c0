"""Backbones: which there are, how to build one, and weight files."""
