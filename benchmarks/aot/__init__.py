"""Compiling attention kernels for accelerators that are not here, and reading what the compilers made of them."""
