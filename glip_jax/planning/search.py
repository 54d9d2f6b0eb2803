"""Which batch, rematerialisation and mesh fit a topology, and which of those is fastest by the roofline."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from glip_jax.config import Config, MeshConfig, Remat
from glip_jax.distributed.chips import Topology
from glip_jax.distributed.mesh import MeshError
from glip_jax.planning.compile import PlanError
from glip_jax.planning.roofline import Roofline
from glip_jax.planning.statistics import CompileStatistics

__all__ = ["Candidate", "candidates", "search", "table", "with_images_per_chip"]


@dataclass(frozen=True)
class Candidate:
    """One candidate and what became of it."""

    images_per_chip: int
    remat: Remat
    fsdp: int
    tensor: int
    found: Roofline | None
    """None where it was not compiled."""
    why: str = ""
    """Why not."""


def candidates(
    config: Config,
    chips: Topology,
    images: Sequence[int],
    remats: Sequence[Remat],
    fsdp: Sequence[int],
    tensor: Sequence[int],
) -> Iterator[tuple[int, Config]]:
    """(images per chip, config) of every combination, fewer images first within a remat and mesh."""
    for shards, parts, remat, count in itertools.product(sorted(fsdp), sorted(tensor), remats, sorted(images)):
        candidate = dataclasses.replace(
            with_images_per_chip(config, count, chips),
            model=dataclasses.replace(config.model, remat=remat),
            mesh=MeshConfig(data=-1, fsdp=shards, tensor=parts),
        )
        yield count, candidate


def with_images_per_chip(config: Config, count: int, chips: Topology) -> Config:
    """`config` with a batch of `count` images for every chip and micro-batch, and so many steps that as many are seen.

    Chips that share an image's work (`mesh.tensor`) have their images together.
    """
    batch_size = count * chips.devices * config.optimizer.accumulate
    steps = max(1, round(config.train.steps * config.train.batch_size / batch_size))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size, steps=steps))


def search(
    every: Sequence[tuple[int, Config]],
    plan: Callable[[Config], tuple[Roofline, CompileStatistics | None]],
    say: Callable[[str], object],
) -> list[Candidate]:
    """Plans each candidate in turn, best first in the result: those that fit by images/s, then the others.

    Where a number of images does not fit, no larger one of the same remat and mesh is tried. A mesh that does not divide is
    left out with its reason, and so is one whose compiler fails, unless all do (PlanError).
    """
    last: PlanError | None = None
    tried: list[Candidate] = []
    for number, (images, config) in enumerate(every, start=1):
        form = (config.model.remat, config.mesh.fsdp, config.mesh.tensor)
        what = f"{number} of {len(every)}: {images} images a chip, remat {form[0]}, fsdp {form[1]}, tensor {form[2]}"
        smaller = [
            t.images_per_chip for t in tried if (t.remat, t.fsdp, t.tensor) == form and t.found and not t.found.fits
        ]
        if smaller:
            tried.append(Candidate(images, *form, None, f"{min(smaller)} images do not fit"))
            say(f"{what}: not tried, {tried[-1].why}")
            continue
        try:
            found, _ = plan(config)
        except (MeshError, PlanError) as fault:
            last = fault if isinstance(fault, PlanError) else last
            tried.append(Candidate(images, *form, None, str(fault)))
            say(f"{what}: {fault}")
            continue
        tried.append(Candidate(images, *form, found))
        say(f"{what}: {'fits' if found.fits else 'does not fit'}, {found.images_per_second:.1f} images/s")
    if last is not None and not any(each.found for each in tried):
        raise last
    return sorted(tried, key=lambda t: (t.found is None, not (t.found and t.found.fits), -_rate(t)))


def _rate(tried: Candidate) -> float:
    return tried.found.images_per_second if tried.found else 0.0


def table(tried: Sequence[Candidate]) -> list[str]:
    """The result of a search, a line a candidate."""
    rows = ["images a chip  remat        fsdp  tensor  peak GiB  fits  images/s    MFU  bound"]
    for each in tried:
        start = f"{each.images_per_chip:13}  {each.remat:11}  {each.fsdp:4}  {each.tensor:6}"
        if each.found is None:
            rows.append(f"{start}  {each.why}")
            continue
        peak = each.found.memory.get("peak", sum(each.found.memory.values())) / 2**30
        fits = {True: "yes", False: "no", None: "?"}[each.found.fits]
        rows.append(
            f"{start}  {peak:8.2f}  {fits:>4}  {each.found.images_per_second:8.1f}  {each.found.mfu:5.1%}  {each.found.bound}"
        )
    return rows
