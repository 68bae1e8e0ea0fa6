"""What the three pruning packages share: errors, registry, cuts, recipes, provenance, storage.

Importing any part of it needs only numpy and the standard library.
"""

__version__ = "0.1.0"
