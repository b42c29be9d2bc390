"""Potluck: volunteer, peer-to-peer training of large models."""

__version__ = "0.1.0"
