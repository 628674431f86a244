"""Readers of real logs and generators of synthetic ones."""
