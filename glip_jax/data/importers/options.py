"""What every form of the job `data` is given, and the base that its forms derive from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from glip_jax.data.importers.entry import Opened
from glip_jax.io import gcs

__all__ = ["BuildOptions", "Place"]

Place = Annotated[
    epath.Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: epath.Path(gcs.address(words[0])),
        is_instance=lambda value: isinstance(value, epath.Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A file or folder, local or gs:// (of which pathlib would take a slash away)."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ABC):
    """What every import needs; a form adds where its annotations and pictures are."""

    out: Place
    """Folder to make, local or gs://; a finished one is left as it is."""
    name: str = ""
    """Name of the source; default: the name of `out`."""
    licence: str = "unknown"
    """Under which terms the data may be used; kept in the manifest. Default: the published set's, where it is one."""
    shards: int | None = None
    """Number of files; default: one for each 4,096 images or captions."""
    processes: int = 0
    """Processes that read the pictures; 0: one a core. The result is the same for any number."""
    strict: bool = False
    """Stop at the first thing that would be dropped."""
    exclude: tyro.conf.UseAppendAction[tuple[Place, ...]] = field(default_factory=tuple)
    """Leave out pictures that are in this folder of shards (or its manifest.json), or whose hash this text file lists;
    may be given several times."""
    published: str = ""
    """Published set to compare with, a name of gcs/manifests; default: the one whose file this is."""

    @property
    @abstractmethod
    def source(self) -> epath.Path:
        """The annotation file (or folder) as the manifest names it."""

    @abstractmethod
    def opened(self, scratch: Path) -> Opened:
        """The source, opened; `scratch` is a folder for temporary files."""
