"""Joins what annotation files keep apart: images here, their annotations there, in any order and of any number.

Both go into a temporary SQLite file, and come out image by image, in the order of the file. Memory does not grow.
"""

import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Join"]

Key = int | str


class Join:
    """Images by key and notes that name one. Values are whatever JSON can say, kept as short lists."""

    def __init__(self, scratch: Path | None = None) -> None:
        """`scratch`: folder for the file; None: where the system keeps temporary files."""
        self._base = sqlite3.connect(
            "" if scratch is None else scratch / f"join-{uuid.uuid4().hex}.sqlite", isolation_level=None
        )
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE images (place INTEGER PRIMARY KEY, key, value TEXT)",
            "CREATE TABLE notes (place INTEGER PRIMARY KEY, image, key, value TEXT)",
        ):
            self._base.execute(statement)

    def add_images(self, rows: Iterable[tuple[Key, list[Any]]]) -> None:
        """Adds (key, value) of each image."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO images (key, value) VALUES (?, ?)", ((_key(key), json.dumps(value)) for key, value in rows)
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    def add_notes(self, rows: Iterable[tuple[Key, Key | None, list[Any]]]) -> None:
        """Adds (image's key, own key or None, value) of each note."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO notes (image, key, value) VALUES (?, ?, ?)",
            ((_key(image), None if key is None else _key(key), json.dumps(value)) for image, key, value in rows),
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_image ON notes (image)")

    def images_of_notes(self) -> None:
        """Adds an image, without a value, for each key that notes name, in the order in which they first do."""
        self._base.execute(
            "INSERT INTO images (key, value) SELECT image, '[]' FROM notes GROUP BY image ORDER BY min(place)"
        )
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    @property
    def count(self) -> int:
        """Images."""
        return self._base.execute("SELECT count(*) FROM images").fetchone()[0]

    def twice(self, table: str) -> Any:
        """A key that stands twice in `images` or `notes`; None if there is none."""
        assert table in ("images", "notes")
        question = (
            f"SELECT key FROM {table} WHERE key IS NOT NULL GROUP BY key HAVING count(*) > 1 ORDER BY place LIMIT 1"
        )
        row = self._base.execute(question).fetchone()
        return None if row is None else row[0]

    def strays(self) -> Iterator[tuple[Any, Any]]:
        """(note's key, image's key) of notes whose image is not there."""
        yield from self._base.execute(
            "SELECT key, image FROM notes WHERE NOT EXISTS (SELECT 1 FROM images WHERE images.key = notes.image) "
            "ORDER BY place"
        )

    def __iter__(self) -> Iterator[tuple[Any, list[Any], list[tuple[Any, list[Any]]]]]:
        """Per image, in the order they were added: key, value, and (key, value) of its notes in theirs."""
        notes = self._base.cursor()
        for key, value in self._base.execute("SELECT key, value FROM images ORDER BY place"):
            found = notes.execute("SELECT key, value FROM notes WHERE image = ? ORDER BY place", (key,))
            yield key, json.loads(value), [(note, json.loads(line)) for note, line in found]


def _key(key: Key) -> Key:
    """As SQLite keeps it: integers beyond its 64 bits become texts, halves of surrogate pairs their escapes."""
    if isinstance(key, str):
        return key.encode(errors="backslashreplace").decode()
    return key if -(2**63) <= key < 2**63 else f"integer {key}"
