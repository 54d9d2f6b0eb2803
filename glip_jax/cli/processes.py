"""Several processes that do one job: the flags by which they find one another, joining, and ending together.

jax is imported by the functions, so that a job's --help is quick.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from glip_jax import UserError
from glip_jax.cli import errors, log
from glip_jax.config import Config, flatten
from glip_jax.config.ranges import Limit, Range
from glip_jax.evaluation.shares import Share
from glip_jax.io import provenance

if TYPE_CHECKING:
    from glip_jax.distributed.cluster import Cluster

__all__ = ["ProcessArguments", "checkpoint_fingerprint", "fingerprints", "run_joined", "share_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessArguments:
    """The flags of a job that several processes can do together."""

    distributed: bool = False
    """Join the other hosts of a pod or cluster first, as a TPU pod or srun announces them."""
    coordinator: str = ""
    """Elsewhere: HOST:PORT of process 0, the same for all; with --processes and --index."""
    processes: Limit = 0
    """How many processes there are."""
    index: Annotated[int, Range(0, 1_000_000, also=(-1,))] = -1
    """Which of them this is, from 0."""
    patience: Annotated[int, Range(1, 1_000_000, "seconds")] = 300
    """Seconds to wait for the other processes."""
    heartbeat: Annotated[int, Range(2, 1_000_000, "seconds")] = 30
    """Seconds of silence after which a process is taken for dead, and the others end, to be started again."""


def run_joined(
    job: str,
    arguments: ProcessArguments,
    facts: Callable[[], Mapping[str, str]],
    work: "Callable[[Cluster | None], int]",
    saves: bool = False,
) -> int:
    """The exit code of `work`, after this process has joined the others; without the flags it works alone, with None.

    `facts`: what all processes must have alike, name to value, asked for after joining. To be called before anything else of
    jax is used. `saves`: the work stops by `Cluster.agreed` after SIGTERM, which does not end the process otherwise. Where several
    processes work, one that fails ends here, so that it waits for none that is gone.

    Raises ProcessError if the processes do not come together or differ, and what `work` raises if it works alone.
    """
    from glip_jax.distributed.cluster import Cluster, Member, ProcessGroup, check_alike, join, leave

    explicit = bool(arguments.coordinator) or arguments.processes > 0 or arguments.index >= 0
    if not arguments.distributed and not explicit:
        _check_alone()
        return work(None)
    where = (arguments.coordinator, arguments.processes, arguments.index)
    join(ProcessGroup(*where, arguments.patience, arguments.heartbeat, job, saves))
    import jax

    if jax.process_count() == 1:
        return work(None)
    index = jax.process_index()
    log.set_process(index)
    cluster = Cluster(errors.exit_code_of, job)
    try:
        with cluster:
            member = Member(index, socket.gethostname(), os.getpid(), facts())
            logger.info(str(member))  # jax names a process that died by its index alone
            check_alike(share_of(cluster).gather(member))
            return work(cluster)
    except BaseException as error:
        if cluster.together(error):
            raise
        leave(errors.exit_code_of(error) if isinstance(error, SystemExit) else errors.report(job, error))


def share_of(cluster: "Cluster | None") -> Share:
    """The part of this process in a job that shares the images of a set."""
    if cluster is None:
        return Share()
    import jax

    return Share(jax.process_index(), jax.process_count())


def fingerprints(config: Config | None) -> dict[str, str]:
    """What all processes must have alike, whatever they do: settings, versions, code."""
    values = {f"config.{name}": repr(value) for name, value in flatten(config)} if config is not None else {}
    values |= {f"version of {name}": version for name, version in provenance.versions().items() if name != "device"}
    values["the package's code"] = provenance.code()["files"][:12]
    return values


def checkpoint_fingerprint(checkpoint: str, step: int | None) -> dict[str, str]:
    """The step and the settings of a checkpoint, as this host sees it."""
    from glip_jax.weights.readers import open_checkpoint_or_export

    try:
        opened = open_checkpoint_or_export(checkpoint, step)
    except UserError as error:  # which the job will say in all processes, if it is the same
        return {"the checkpoint": f"unreadable ({error})"}
    return {"the checkpoint": f"step {opened.step}, settings {provenance.config_hash(opened.settings)[:12]}"}


def _check_alone() -> None:
    """Raises ProcessError if this process was started as one of several, which would all do the same into one folder."""
    from glip_jax.distributed.cluster import ProcessError, announced

    number, by = announced(os.environ)
    if number > 1:
        raise ProcessError(
            f"{by} announces {number} processes, but --distributed is not given: each would do all of it alone, into the same "
            "folder; give --distributed, or start one process only"
        )
