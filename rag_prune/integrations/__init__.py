"""Adapters that make a `ContextPruner` a part of other frameworks; each imports only its own."""
