"""Kernels of coupfast: the definitions, and the fast code that agrees with them."""
