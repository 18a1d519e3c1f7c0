"""Backbones and passes that several tests use."""
