"""One file a paper: a recipe of the core's parts, with the paper's defaults."""
