"""Options that all formats of the job `data` share; the options of a format derive from `BuildOptions`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from glip_jax.config import Orientation
from glip_jax.config.ranges import Count, Processes
from glip_jax.data.importers.entry import ImportSource
from glip_jax.io import gcs
from glip_jax.io.sharing import SharingFlags

__all__ = ["BuildOptions", "PathArgument"]

PathArgument = Annotated[
    epath.Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: epath.Path(gcs.address(words[0])),
        is_instance=lambda value: isinstance(value, epath.Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""Type of a path argument, local or gs:// (pathlib would remove one of its slashes)."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(SharingFlags, ABC):
    """Options of every import; a format adds those for its annotations and images."""

    out: PathArgument
    """Output folder, local or gs://; a completed one is left unchanged."""
    name: str = ""
    """Name of the source; default: the name of `out`."""
    licence: str = "unknown"
    """Licence of the data, recorded in the manifest; default: that of the published data set, if it is one."""
    shards: Count | None = None
    """Number of shard files; default: one per 4,096 images or captions."""
    processes: Processes = 0
    """Processes that read the images; 0: one per core. The result does not depend on it."""
    strict: bool = False
    """Stop at the first item that would be dropped."""
    allow_drops: bool = False
    """Complete the folder although most boxes or images are dropped for one reason, which is refused otherwise."""
    exclude: tyro.conf.UseAppendAction[tuple[PathArgument, ...]] = field(default_factory=tuple)
    """Exclude images that are in this folder of shards (or its manifest.json), or whose hash this text file lists; can be
    repeated."""
    orientation: Orientation = "auto"
    """What boxes refer to in an image that its EXIF orientation rotates or mirrors: the image `upright`, or its `stored` pixels;
    `auto`: which of them has the listed size, the stored pixels where no listed size tells."""
    published: str = ""
    """Published data set to compare with, a name in gcs/manifests; default: recognized by the annotation file's name."""

    @property
    @abstractmethod
    def source(self) -> epath.Path:
        """The annotation file (or folder), as recorded in the manifest."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation files (or folders of small files), as `ImportSource.inputs`; a finished folder is compared with them."""

    @property
    def chosen_drops(self) -> frozenset[str]:
        """Reasons for drops that the options ask for, which may take most boxes."""
        return frozenset()

    @abstractmethod
    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations; `scratch` is a folder for temporary files."""
