"""Searches batch sizes, rematerialization settings and meshes for those that fit a topology, ranked by the roofline."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from glip_jax.config import Config, MeshConfig, Remat
from glip_jax.distributed.mesh import MeshError
from glip_jax.planning.compile import PlanError
from glip_jax.planning.roofline import Roofline
from glip_jax.planning.statistics import CompileStatistics
from glip_jax.training.monitoring.chips import Topology

__all__ = ["Candidate", "candidates", "search", "table", "with_images_per_chip"]


@dataclass(frozen=True)
class Candidate:
    """A combination of settings, and its predicted step."""

    images_per_chip: int
    remat: Remat
    fsdp: int
    tensor: int
    roofline: Roofline | None
    """None if there is no plan."""
    reason: str = ""
    """Why there is no plan."""


def candidates(
    config: Config,
    chips: Topology,
    images: Sequence[int],
    remats: Sequence[Remat],
    fsdp: Sequence[int],
    tensor: Sequence[int],
) -> Iterator[tuple[int, Config]]:
    """Yields (images per chip, config) for every combination; within a remat setting and mesh in ascending order of images."""
    for shards, parts, remat, count in itertools.product(sorted(fsdp), sorted(tensor), remats, sorted(images)):
        candidate = dataclasses.replace(
            with_images_per_chip(config, count, chips),
            model=dataclasses.replace(config.model, remat=remat),
            mesh=MeshConfig(data=-1, fsdp=shards, tensor=parts),
        )
        yield count, candidate


def with_images_per_chip(config: Config, count: int, chips: Topology) -> Config:
    """`config` with `count` images per chip and micro-batch, and with the number of steps that trains on as many images.

    Chips along `mesh.tensor` process their images together.
    """
    batch_size = count * chips.devices * config.optimizer.accumulate
    steps = max(1, round(config.train.steps * config.train.batch_size / batch_size))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size, steps=steps))


def search(
    combinations: Sequence[tuple[int, Config]],
    plan: Callable[[Config], tuple[Roofline, CompileStatistics | None]],
    progress: Callable[[str], object],
) -> list[Candidate]:
    """Plans each of `combinations`, (images per chip, config); returns those that fit by descending images/s, then the others.

    If a number of images does not fit, larger ones with the same remat setting and mesh are skipped. A mesh that does not
    divide, and a candidate whose compilation fails, are returned with the reason; PlanError is raised if all compilations
    fail. `progress` receives a line for each candidate.
    """
    last: PlanError | None = None
    results: list[Candidate] = []
    for number, (images, config) in enumerate(combinations, start=1):
        setting = (config.model.remat, config.mesh.fsdp, config.mesh.tensor)
        label = f"{number} of {len(combinations)}: {images} images a chip, remat {setting[0]}, fsdp {setting[1]}, tensor {setting[2]}"
        smaller = [
            each.images_per_chip
            for each in results
            if (each.remat, each.fsdp, each.tensor) == setting and each.roofline and not each.roofline.fits
        ]
        if smaller:
            results.append(Candidate(images, *setting, None, f"{min(smaller)} images do not fit"))
            progress(f"{label}: skipped, {results[-1].reason}")
            continue
        try:
            planned, _ = plan(config)
        except (MeshError, PlanError) as fault:
            last = fault if isinstance(fault, PlanError) else last
            results.append(Candidate(images, *setting, None, str(fault)))
            progress(f"{label}: {fault}")
            continue
        results.append(Candidate(images, *setting, planned))
        progress(f"{label}: {'fits' if planned.fits else 'does not fit'}, {planned.images_per_second:.1f} images/s")
    if last is not None and not any(each.roofline for each in results):
        raise last
    return sorted(results, key=lambda t: (t.roofline is None, not (t.roofline and t.roofline.fits), -_rate(t)))


def _rate(candidate: Candidate) -> float:
    return candidate.roofline.images_per_second if candidate.roofline else 0.0


def table(results: Sequence[Candidate]) -> list[str]:
    """The result of a search as lines, one per candidate."""
    rows = ["images a chip  remat        fsdp  tensor  peak GiB  fits  images/s    MFU  bound"]
    for each in results:
        start = f"{each.images_per_chip:13}  {each.remat:11}  {each.fsdp:4}  {each.tensor:6}"
        if each.roofline is None:
            rows.append(f"{start}  {each.reason}")
            continue
        peak = each.roofline.memory.get("peak", sum(each.roofline.memory.values())) / 2**30
        fits = {True: "yes", False: "no", None: "?"}[each.roofline.fits]
        rows.append(
            f"{start}  {peak:8.2f}  {fits:>4}  {each.roofline.images_per_second:8.1f}  {each.roofline.mfu:5.1%}  {each.roofline.bound}"
        )
    return rows
