"""Settings of the data: sources, captions, crops and colours, and what they must keep. Part of `glip_jax.config.run`."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CaptionConfig",
    "Codec",
    "CropConfig",
    "DataConfig",
    "JitterConfig",
    "PackingConfig",
    "SourceConfig",
    "data_checks",
    "runtime_field",
]

Codec = Literal["fast", "pillow"]
"""How images of training are resized: OpenCV's bilinear filter on what libjpeg-turbo decoded, or Pillow's, as the original."""


def runtime_field(default: Any) -> Any:
    """A field that changes no number of the training."""
    return field(default=default, metadata={"affects_results": False})


@dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture: a folder of shards with a manifest."""

    path: str
    weight: float = 1.0
    """Share of examples relative to the other sources' weights; must be positive."""
    copies: int = 0
    """Instead of a weight, as in the original: the share is copies x records. Of all sources or of none; 0: by weight."""
    box_weight: Literal["one", "score"] = "one"
    """What a box of the source counts in the losses: 1, as in the original, or its teacher's score (pseudo records)."""
    threshold: float = 0.0
    """Pseudo records: boxes of this score or less are left out, counted as `boxes_below_threshold`; where the phrase has no other,
    it is not known where it is. 0.5 in GLIP-L, where the words then count as absent (glip-reference 4.6)."""
    negatives: tuple[str, ...] = ()
    """More names that may be drawn as negatives: the user says that they are absent from every image of the source
    (one that is a name of the source or a phrase of the image is never drawn)."""


@dataclass(frozen=True)
class PackingConfig:
    """Negative text beside the caption of a grounding or pseudo record, taken from elsewhere (glip-reference 4.6).

    GLIP-T packs nothing, which is the default; GLIP-L packs `number=20` captions with these probabilities.
    """

    number: int = 0
    """Most texts packed with a caption; 0 leaves every caption as it is."""
    none_probability: float = 0.4
    """Chance of packing none."""
    full_probability: float = 0.5
    """Chance, where it is not none, of packing `number`; otherwise a uniform number from 0 to number - 1."""
    take: Literal["captions", "phrases", "names"] = "captions"
    """`captions` of other records of the source, their `phrases` with boxes, or the source's `negatives`."""
    kinds: tuple[Literal["pseudo", "grounding"], ...] = ("pseudo",)


@dataclass(frozen=True)
class CaptionConfig:
    """How a record becomes a caption (defaults: the original's, glip-reference 1.7 and 4.2).

    The number of negative names is `max_negatives` (or as many as there are) with `full_probability`, 1 with
    `one_negative_probability`, 0 with `one_positive_probability`, and otherwise uniform from 1 to that number.
    """

    mode: Literal["sampled", "all_names"] = "sampled"
    """`all_names`: every name of the source in its order (shuffled if `shuffle`), as in fine-tuning (4.3)."""
    separator: str = ". "
    max_negatives: int = 85
    full_probability: float = 0.5
    one_negative_probability: float = 0.0
    one_positive_probability: float = 0.0
    drop_positive_probability: float = 0.0
    """Chance of keeping only a uniform number, at least 1, of the positive names, and their boxes. The original names it
    but refuses any value except 0."""
    hard_share: float = 0.0
    """Share of the negatives (names or packed phrases) drawn from those most like the positives in words and letters."""
    shuffle: bool = True
    words_without_box: Literal["negative", "unknown"] = "negative"
    """Words of grounding and pseudo captions that are in no box's phrase: negative everywhere, as in the original, or
    unknown, so that they give no loss where no box is."""
    packing: PackingConfig = PackingConfig()


@dataclass(frozen=True)
class CropConfig:
    """Random crop, before the resize; the original has none."""

    probability: float = 0.0
    min_side: float = 0.5
    """Least share of height and of width that stays, each drawn anew."""
    min_visible: float = 0.4
    """Boxes of which a smaller share of the area stays visible are dropped, counted as `boxes_out_of_view`."""


@dataclass(frozen=True)
class JitterConfig:
    """Random colours, after the resize; the original has none. Factors are uniform in 1 - x to 1 + x."""

    probability: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    """Turn of the colour circle, uniform in -x to x; 0.5 is its opposite side."""


@dataclass(frozen=True)
class DataConfig:
    """The mixture and what happens to an example before it is batched."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    captions: CaptionConfig = CaptionConfig()
    short_sides: tuple[int, ...] = (480, 560, 640, 720, 800)
    """Candidate lengths of the short side, pixels; one per step."""
    long_side: int = 1333
    """Upper bound of the long side, pixels."""
    aspects: tuple[float, ...] = (0.666667, 0.75, 1.0, 1.333333, 1.5)
    """Height / width of the canvases; each record goes to the nearest (in log). Each pair of short side and aspect is one compiled shape."""
    codec: Codec = "fast"
    """`pillow`: the original's pixels, at a third of the speed."""
    flip: float = 0.5
    """Chance of mirroring left and right."""
    flip_captions: Literal["as_is", "safe"] = "as_is"
    """`safe`: examples whose caption or names say left or right are not mirrored. The original mirrors them as they are."""
    crop: CropConfig = CropConfig()
    jitter: JitterConfig = JitterConfig()
    max_boxes: int = 100
    """Box slots per image; more are cut, counted as `boxes_over_limit`."""
    workers: int = runtime_field(0)
    """Grain worker processes; 0 reads in threads of this process."""
    threads: int = runtime_field(4)
    prefetch: int = runtime_field(8)
    """Batches read ahead."""
    max_corrupt_rate: float = runtime_field(0.01)
    """A run stops where more than this share of a source's examples, counted over `corrupt_window`, is corrupt."""
    corrupt_window: int = runtime_field(1000)
    """Examples of a source."""


def data_checks(data: DataConfig) -> list[tuple[bool, str]]:
    """What the settings of the data must keep, each with the message for where it is broken."""
    captions, packing = data.captions, data.captions.packing
    chances = {
        "flip": data.flip, "crop.probability": data.crop.probability, "jitter.probability": data.jitter.probability,
        "captions.full_probability": captions.full_probability, "captions.hard_share": captions.hard_share,
        "captions.one_negative_probability": captions.one_negative_probability,
        "captions.one_positive_probability": captions.one_positive_probability,
        "captions.drop_positive_probability": captions.drop_positive_probability,
        "captions.packing.none_probability": packing.none_probability,
        "captions.packing.full_probability": packing.full_probability, "max_corrupt_rate": data.max_corrupt_rate,
        "crop.min_visible": data.crop.min_visible, "crop.min_side": data.crop.min_side,
        "jitter.brightness": data.jitter.brightness, "jitter.contrast": data.jitter.contrast,
        "jitter.saturation": data.jitter.saturation, "jitter.hue": data.jitter.hue,
    }  # fmt: skip
    total = captions.full_probability + captions.one_negative_probability + captions.one_positive_probability
    checks = [(0 <= value <= 1, f"data.{name} is {value}: expected 0 to 1") for name, value in chances.items()]
    checks += [
        (total <= 1 + 1e-9,
         f"data.captions: full_probability {captions.full_probability}, one_negative_probability {captions.one_negative_probability} "
         f"and one_positive_probability {captions.one_positive_probability} add up to {total:g}: expected at most 1"),
        (captions.max_negatives >= 0, f"data.captions.max_negatives is {captions.max_negatives}: expected 0 or more"),
        (packing.number >= 0, f"data.captions.packing.number is {packing.number}: expected 0 or more"),
        (data.crop.min_side > 0, f"data.crop.min_side is {data.crop.min_side}: expected more than 0"),
        (data.corrupt_window > 0, f"data.corrupt_window is {data.corrupt_window}: expected at least 1"),
    ]  # fmt: skip
    copied = [name for name, source in data.sources.items() if source.copies]
    for name, source in data.sources.items():
        checks += [
            (source.weight > 0, f"data.sources.{name}.weight is {source.weight}: remove the source instead of weight 0"),
            (0 <= source.threshold < 1,
             f"data.sources.{name}.threshold is {source.threshold}: expected 0 to less than 1"),
            (source.copies >= 0, f"data.sources.{name}.copies is {source.copies}: expected 0 (by weight) or more"),
            (not source.copies or source.weight == 1.0,
             f"data.sources.{name} has weight {source.weight} and copies {source.copies}: give one of them"),
            (bool(source.copies) == bool(copied),
             f"data.sources.{name} goes by weight {source.weight}, data.sources.{copied[0] if copied else ''} by copies: "
             "give all sources weights, or all copies"),
        ]  # fmt: skip
    return checks
