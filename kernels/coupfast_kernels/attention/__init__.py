"""Self-attention over the pixels of a map, and its transpose: `definition`, and the CPU's C++ (`cpu`)."""
