"""Attention over pruned pages, compiled: C++ for the CPU, Triton for the GPU."""
