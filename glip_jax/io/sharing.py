"""The flags by which several machines share the tasks of a job: a static part, or a Ray cluster."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glip_jax import UserError
from glip_jax.config.ranges import Limit

__all__ = ["Engine", "Part", "SharingError", "SharingFlags", "without_sharing"]

Engine = Callable[[Callable[[], Callable[[Any], Any]], Sequence[str], Callable[[str], Any]], Iterator[str]]
"""Does tasks elsewhere. Takes what makes a worker, the names of the tasks, and a function that gives a worker's argument for each; yields the
names as they are done."""


class SharingError(UserError, ValueError):
    """Flags of sharing that make no sense."""


@dataclass(frozen=True)
class Part:
    """Every `count`-th task, from the `index`-th on, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, names: Sequence[str]) -> list[str]:
        """The tasks of this part, in order."""
        return list(names[self.index - 1 :: self.count])


@dataclass(frozen=True, kw_only=True)
class SharingFlags:
    """The flags. The result is the same, byte for byte, whoever does which task."""

    part: str = ""
    """I/N: do the I-th of N parts of the work, counted from 1, for arrays of SLURM and indexed jobs of Kubernetes: give N processes the same
    command with another I. The one that ends last completes OUT, which all must see."""
    ray: str = ""
    """auto, or HOST:PORT: work on a Ray cluster, which all must see OUT and the inputs; needs requirements-ray.txt. auto: the cluster that this
    machine belongs to, or RAY_ADDRESS."""
    ray_workers: Limit = 0
    """Workers to ask the Ray cluster for, which an autoscaler may start machines for; 0: as many as its machines offer now."""
    ray_resources: str = ""
    """What Ray reserves for a worker, such as TPU=4 or CPU=8,GPU=1; default: one TPU or one GPU where a machine has any, else for `label` a machine
    (with --ray-workers a core), for `data` a core."""

    def static_part(self) -> Part | None:
        """The part that --part names; None without it. SharingError for anything but I/N with 1 <= I <= N, or for --part beside --ray."""
        if not self.part:
            return None
        if self.ray:
            raise SharingError(f"--part={self.part} and --ray={self.ray}: Ray shares the work itself; give one of them")
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise SharingError(
                f"--part={self.part}: expected I/N with I from 1 to N, such as 3/16; to an index that counts from 0 add 1"
            )
        return Part(int(found[1]), int(found[2]))

    def resources(self) -> dict[str, float]:
        """What --ray-resources names; SharingError for anything but NAME=NUMBER, or without --ray."""
        for flag, given in (("--ray-resources", self.ray_resources), ("--ray-workers", self.ray_workers)):
            if given and not self.ray:
                raise SharingError(f"{flag}={given} has no meaning without --ray: give one, or leave it out")
        found = dict[str, float]()
        for pair in filter(None, self.ray_resources.split(",")):
            name, _, value = pair.partition("=")
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = math.nan
            if not name or not 0 < found[name] < math.inf:
                raise SharingError(f"--ray-resources={self.ray_resources}: {pair!r} is not NAME=NUMBER, such as TPU=4")
        return found


_FLAGS = ("--part", "--ray", "--ray-workers", "--ray-resources")


def without_sharing(argv: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The arguments without those of sharing and the flags `more`: the command that a folder records, alike for all who work on it."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
            continue
        name, equals, _ = argument.replace("_", "-").partition("=")
        if name in (*_FLAGS, *more):
            skip = not equals
        else:
            kept.append(argument)
    return kept
