"""Runs a job as `python -m glip_jax` does, in this process: its errors become an exit code and a line on stderr."""

from glip_jax import __main__

__all__ = ["run_job"]


def run_job(job, argv):
    return __main__.main([job, *map(str, argv)])
