"""Context pruning: which sentences of the passages help to answer, and which passage is best."""
