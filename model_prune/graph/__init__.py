"""Coupled groups of weights, and cutting them out for real."""
