"""Runtime settings that must be made before the first program runs: flags of libtpu, the compilation cache."""

import os
import re
from pathlib import Path

__all__ = ["enable_compilation_cache", "job_began", "libtpu_arguments"]

job_began: float | None = None
"""When the job of this process began, seconds since 1970; None outside of a job and after its first training has read it."""


_STACKS = ("fibers_default_thread_stack_size", "default_thread_stack_size", "xla_internal_thread_stack_size_bytes")
"""Flags of libtpu, each in bytes."""


def libtpu_arguments(before: str) -> str:
    """LIBTPU_INIT_ARGS with larger stacks for the threads of the compiler; flags in its present value `before` win.

    With the default stacks of 64 kB libtpu 0.0.42 overflows on the step of GLIP-T (CalculateClassicWindowCost is recursive).
    """
    given = {word.lstrip("-").partition("=")[0] for word in before.split()}
    return " ".join([*before.split(), *(f"--{flag}={8 << 20}" for flag in _STACKS if flag not in given)])


def enable_compilation_cache(workdir: str = "") -> str:
    """Turns on the persistent compilation cache, and returns its folder: JAX_COMPILATION_CACHE_DIR; else, where `workdir` lies in a
    bucket, gs://BUCKET/compilation_cache, which all its runs and hosts share; else ~/.cache/glip_jax/jax.

    jax opens gs:// through etils.epath, with the retries of `glip_jax.io.fsspec_gcs` where that is installed.
    """
    bucket = re.match(r"gs:/+([^/]+)", workdir)
    default = f"gs://{bucket[1]}/compilation_cache" if bucket else str(Path.home() / ".cache" / "glip_jax" / "jax")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or default
    import jax  # only now: `libtpu_arguments` must be set before jax is imported
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] != folder:
        compilation_cache.reset_cache()  # jax opens its cache once
        jax.config.update("jax_compilation_cache_dir", folder)
    return folder
