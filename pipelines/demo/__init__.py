"""What `prunekit demo` reads: Python's own language reference, with questions about it."""
