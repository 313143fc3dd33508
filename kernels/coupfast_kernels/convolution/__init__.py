"""Convolutions: `definition`; the CPU's algorithms in C++ (`cpu`); the GPU's 3 × 3 kernel (`gpu`, `gpu_tuning`)."""
