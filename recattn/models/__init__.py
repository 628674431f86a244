"""Ranking models out of fused layers."""
