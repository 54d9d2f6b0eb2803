"""The workers of a Ray cluster as what does the tasks of a job: `label` and `data`."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from glip_jax import UserError
from glip_jax.distributed.ray_tasks import check_cluster, ray_workers
from glip_jax.distributed.runtime import libtpu_arguments
from glip_jax.io import fsspec_gcs, provenance
from glip_jax.io.sharing import Engine, SharingFlags

__all__ = ["ray_engine"]


class CodeError(UserError, RuntimeError):
    """A machine of the cluster has another version of this package."""


def ray_engine(flags: SharingFlags, resources: Mapping[str, float], by_core: bool = False) -> Engine:
    """Does tasks on the cluster that `flags` name; see `ray_workers`. Workers with other code than this process are refused (CodeError).

    Raises RayError at once without ray, or where no cluster answers.
    """
    check_cluster(flags.ray)
    files, folder = provenance.code()["files"], os.getcwd()

    def engine(
        make: Callable[[], Callable[[Any], Any]], names: Sequence[str], payload: Callable[[str], Any]
    ) -> Iterator[str]:
        made = partial(_made, make, files, folder)
        with ray_workers(
            flags.ray, made, count=flags.ray_workers, most=len(names), resources=resources, by_core=by_core
        ) as run:
            yield from run(names, payload)

    return engine


def _made(make: Callable[[], Callable[[Any], Any]], files: str, folder: str) -> Callable[[Any], Any]:
    """What does the tasks on a worker, set up as `glip_jax.__main__` does it; its errors name the machine."""
    with _named():
        here = provenance.code()["files"]
        if here != files:
            raise CodeError(
                f"another glip_jax is installed (files {here[:12]}) than where the job was begun ({files[:12]}): install the same version on all machines "
                "of the cluster"
            )
        with contextlib.suppress(OSError):  # without it, relative paths name nothing here, and an error says so
            os.chdir(folder)
        os.environ["LIBTPU_INIT_ARGS"] = libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", ""))
        fsspec_gcs.install()
        made = make()

    def do(task: Any) -> None:
        with _named():
            made(task)

    return do


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.args = (f"{error} (on the machine {socket.gethostname()})",)
        raise
