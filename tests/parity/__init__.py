"""Comparison with the original. Programs run once here, so compiling them fast matters more than running them fast."""

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # read when jax starts
