"""Kernels of our own for CPUs: one C++ file, built on first use."""
