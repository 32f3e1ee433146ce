"""Triton kernels, one file per op; imported as `flexjudge_fast.kernels`, by `flexjudge_fast.ops` alone."""
