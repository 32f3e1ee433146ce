"""Compiles kernels ahead of time, with no GPU at hand: a driver that only compiles, bundles, reports."""
