"""Kernels for TPUs (Pallas): the same results as the plain code of `models`, which selects them by the platform."""
