"""Runtime settings that must be made before the first program runs: flags of libtpu, the compilation cache."""

import os
from pathlib import Path

__all__ = ["enable_compilation_cache", "libtpu_arguments"]


_STACKS = ("fibers_default_thread_stack_size", "default_thread_stack_size", "xla_internal_thread_stack_size_bytes")
"""Flags of libtpu, each in bytes."""


def libtpu_arguments(before: str) -> str:
    """LIBTPU_INIT_ARGS with larger stacks for the threads of the compiler; flags in its present value `before` win.

    With the default stacks of 64 kB libtpu 0.0.42 overflows on the step of GLIP-T (CalculateClassicWindowCost is recursive).
    """
    given = {word.lstrip("-").partition("=")[0] for word in before.split()}
    return " ".join([*before.split(), *(f"--{flag}={8 << 20}" for flag in _STACKS if flag not in given)])


def enable_compilation_cache() -> None:
    """Turns on the persistent compilation cache, in JAX_COMPILATION_CACHE_DIR or ~/.cache/glip_jax/jax."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "glip_jax" / "jax")
    import jax  # only now: `libtpu_arguments` must be set before jax is imported

    jax.config.update("jax_compilation_cache_dir", folder)
