"""Modules that run inside an emitted network; they import torch only."""
