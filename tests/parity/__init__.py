"""Comparison with the original. Programs run once, so compilation time matters more than run time."""

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # read when jax starts
