"""Sums written for a platform: Pallas kernels for TPUs, and blocks for the caches of CPUs. The code of `models` selects by the platform."""
