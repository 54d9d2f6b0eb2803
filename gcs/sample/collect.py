"""Creates gcs/sample/pictures: the pictures listed in names.txt in three styles, reduced, with names.json; and descriptions.json.

    python gcs/sample/collect.py --packages=DIR

DIR has the four npm packages (`npm pack` downloads missing ones, 157 MB in total; their hashes are checked). The files depend only on
the packages and the version of Pillow. The licences in gcs/sample are maintained manually. --descriptions makes descriptions.json alone.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent


class Style(NamedTuple):
    """Source of the pictures of a style, and how they are stored."""

    package: str
    file: str
    """Name of the package tarball that `npm pack` writes."""
    sha256: str
    member: str
    """Path of a picture in the tarball, {} for its code points."""
    side: int
    """Side of the stored pictures in pixels."""
    quality: int


STYLES = {
    "fluent": Style(
        "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "package/assets/{}.webp", 128, 80,
    ),
    "noto": Style(
        "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "package/img/google/64/{}.png", 64, 88,
    ),
    "twemoji": Style(
        "emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "package/img/twitter/64/{}.png", 64, 88,
    ),
}  # fmt: skip

KEYWORDS = ("cldr-annotations-full@48.2.0", "cldr-annotations-full-48.2.0.tgz",
            "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1", "package/annotations/en/annotations.json")  # fmt: skip
"""Unicode's keywords of emoji: package, tarball, its hash, and the file in it."""
_WORDS = 4
"""Most keywords of a description."""

# Assigned in the order of names.txt, where neighbours are similar: five of eight names to detection, one to each other split.
SPLITS = ("detection", "detection", "grounding", "detection", "captions", "detection", "unseen", "detection")


def chosen(listing: Path) -> dict[str, dict[str, str]]:
    """Reads names.txt: code point (hex) -> name and split, in its order.

    Raises:
        SystemExit: what Unicode does not know, or stands twice; all of it is listed.
    """
    entries: dict[str, dict[str, str]] = {}
    wrong = []
    for line in listing.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        for item in line.split(": ", 1)[1].split(", "):
            name, _, official = (part.strip() for part in item.partition("="))
            try:
                code = f"{ord(unicodedata.lookup((official or name).upper())):x}"
            except KeyError:
                wrong.append(f"{item!r} (no such Unicode name)")
                continue
            if code in entries or any(entry["name"] == name for entry in entries.values()):
                wrong.append(f"{item!r} (its name or picture stands twice)")
                continue
            entries[code] = {"name": name, "split": SPLITS[len(entries) % len(SPLITS)]}
    if wrong:
        raise SystemExit(f"{listing}: " + ", ".join(wrong))
    return entries


def fetched(packages: Path, package: str, file: str, sha256: str) -> Path:
    """The package's tarball in `packages`, downloaded by npm if missing; SystemExit if its hash differs."""
    path = packages / file
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=packages, check=True)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{path} has sha256 {found}, expected {sha256}: delete it and run again")
    return path


def reduce(tarball: Path, style: Style, codes: list[str], out: Path) -> None:
    """Writes `codes` of a style as CODE.webp into `out`; SystemExit with the list of those that are missing in the package."""
    # Packages write code points differently: with a trailing emoji selector, or with leading zeros.
    wanted = {style.member.format(text): code for code in codes for text in (code, f"{code}-fe0f", code.zfill(4))}
    missing = set(codes)
    # As a stream: seeking back in a gzip file reads it again from the start.
    with tarfile.open(tarball, "r|gz") as archive:
        for member in archive:
            code = wanted.get(member.name)
            if code not in missing or (stream := archive.extractfile(member)) is None:
                continue
            with Image.open(io.BytesIO(stream.read())) as picture:
                image = picture.convert("RGBA")
            if max(image.size) > style.side:
                image = image.resize((style.side, style.side), Image.Resampling.LANCZOS)
            image.save(out / f"{code}.webp", quality=style.quality, method=6)
            missing.remove(code)
    if missing:
        raise SystemExit(f"{tarball} has no picture of {', '.join(sorted(missing))}")


def collect(packages: Path, out: Path) -> dict[str, dict[str, str]]:
    """Creates everything in `out` except the licences; returns the content of names.json (code point -> name, split)."""
    entries = chosen(HERE / "names.txt")
    packages.mkdir(parents=True, exist_ok=True)
    for name, style in STYLES.items():
        tarball = fetched(packages, style.package, style.file, style.sha256)
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        reduce(tarball, style, list(entries), out / name)
    (out / "names.json").write_text(json.dumps(entries, indent=1) + "\n")
    return entries


def descriptions(tarball: Path, entries: dict[str, dict[str, str]]) -> dict[str, str]:
    """Name -> at most four of Unicode's keywords, those first that most of the names have; without words of the name itself.

    Names whose keywords say nothing more are left out. Words that many names share are those that a never-seen name can be known by.
    """
    with tarfile.open(tarball) as archive:
        stream = archive.extractfile(KEYWORDS[3])
        assert stream is not None, f"{tarball} has no {KEYWORDS[3]}"
        listed = json.loads(stream.read())["annotations"]["annotations"]
    keywords = {}
    for code, entry in entries.items():
        own = set(entry["name"].lower().replace("-", " ").split())
        words = (word.lower().replace("’", "'") for word in listed[chr(int(code, 16))]["default"])
        keywords[entry["name"]] = [
            word for word in words if not set(word.replace("-", " ").split()) & (own | {f"{w}s" for w in own})
        ]
    number = Counter(word for words in keywords.values() for word in words)
    ordered = {name: sorted(words, key=lambda word: (-number[word], word))[:_WORDS] for name, words in keywords.items()}
    return {name: " ".join(words) for name, words in ordered.items() if words}


def write_descriptions(packages: Path) -> None:
    """Creates gcs/sample/descriptions.json."""
    packages.mkdir(parents=True, exist_ok=True)
    texts = descriptions(fetched(packages, *KEYWORDS[:3]), chosen(HERE / "names.txt"))
    (HERE / "descriptions.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(texts)} descriptions in {HERE / 'descriptions.json'}", file=sys.stderr)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the npm packages")
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="folder to write")
    parser.add_argument("--descriptions", action="store_true", help="descriptions.json alone")
    arguments = parser.parse_args()
    write_descriptions(arguments.packages)
    if arguments.descriptions:
        return
    entries = collect(arguments.packages, arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*.webp")) / 1e6
    print(f"{len(entries)} names in {len(STYLES)} styles in {arguments.out}, {size:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
