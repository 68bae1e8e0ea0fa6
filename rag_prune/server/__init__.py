"""Pruning over HTTP: concurrent requests share batches, and the rest is guarding the door."""
