"""One metric a file; `data_prune.METHODS` lists them."""
