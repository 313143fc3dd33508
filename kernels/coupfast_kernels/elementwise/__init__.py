"""Sums of maps and transposes of ReLUs that no convolution took in: `definition`, and the CPU's C++ (`cpu`)."""
