"""Settings of the runtime that must stand before the first program: libtpu's flags, the compilation cache."""

import os
from pathlib import Path

__all__ = ["enable_compilation_cache", "libtpu_arguments"]


_STACKS = ("fibers_default_thread_stack_size", "default_thread_stack_size", "xla_internal_thread_stack_size_bytes")
"""Flags of libtpu, each in bytes."""


def libtpu_arguments(before: str) -> str:
    """LIBTPU_INIT_ARGS with larger stacks for the compiler's threads, `before` being its value so far, which wins.

    With its own stacks of 64 kB libtpu 0.0.42 dies of an overflow over GLIP-T's step (CalculateClassicWindowCost calls itself).
    """
    given = {word.lstrip("-").partition("=")[0] for word in before.split()}
    return " ".join([*before.split(), *(f"--{flag}={8 << 20}" for flag in _STACKS if flag not in given)])


def enable_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/glip_jax/jax, for later runs."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "glip_jax" / "jax")
    import jax  # only now: `libtpu_arguments` is read before jax is

    jax.config.update("jax_compilation_cache_dir", folder)
