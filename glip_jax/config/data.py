"""Settings of the training data: sources, captions, image augmentation, and their checks. Offered by `glip_jax.config`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from glip_jax.config.ranges import BelowOne, Count, Fraction, Limit, Pixels, Range

__all__ = [
    "ASSET", "PATH", "AssetStr", "CaptionConfig", "Codec", "CropConfig", "DataConfig", "DescriptionsConfig", "JitterConfig", "PackingConfig", "PathStr", "SourceConfig",
]  # fmt: skip

PATH, ASSET = "path", "path or package:"
PathStr = Annotated[str, PATH]
AssetStr = Annotated[str, ASSET]
"""Paths, local or gs://, as an AssetStr also package:NAME/inner/file. `glip_jax.io.paths` checks the fields of these types."""

Codec = Literal["fast", "pillow"]
"""Decoder and resize of training images: libjpeg-turbo and OpenCV's bilinear filter, or Pillow as in the original code."""


def runtime_field(default: Any) -> Any:
    """A dataclass field that changes no number of the training: it may differ when a run is resumed."""
    return field(default=default, metadata={"affects_results": False})


@dataclass(frozen=True)
class SourceConfig:
    """One data source of the mixture: a folder of shards with a manifest."""

    path: PathStr
    """Folder of the shards, local or gs://."""
    weight: Annotated[float, Range(0, 1e9, "(remove a source instead)", above=True)] = 1.0
    """Relative share of the examples; positive. Shares are the weights divided by their sum."""
    copies: Limit = 0
    """Alternative to `weight`, as in the original code: the share is proportional to copies x records. Set for all sources or
    for none; 0: by weight."""
    box_weight: Literal["one", "score"] = "one"
    """Weight of a box in the losses: 1, as in the original, or the score that the teacher gave it (pseudo records)."""
    threshold: BelowOne = 0.0
    """Score threshold for pseudo records: boxes at or below it are dropped and counted as `boxes_below_threshold`. A phrase
    that loses its last box becomes unlabelled. GLIP-L uses 0.5 and treats such phrases as absent (glip-reference 4.6)."""
    negatives: tuple[str, ...] = ()
    """Additional names to sample as negatives. The user guarantees that they are absent from every image of the source.
    Names of the source's own categories and phrases of the image are never sampled."""
    complete: Literal["own", "all"] = "own"
    """How complete the labels are for names of other sources (`captions.dictionary`). `own`: nothing is known of them, so they are never
    negatives. `all`: the user guarantees that whatever an image shows and a name of the dictionary names has a box or a phrase; records that list what is
    absent (`known_absent`) say it themselves."""


@dataclass(frozen=True)
class PackingConfig:
    """Negative texts that are packed around the caption of a grounding or pseudo record (glip-reference 4.6).

    GLIP-T packs none (the default). GLIP-L packs `number=20` captions with the probabilities below.
    """

    number: Limit = 0
    """Maximum number of texts packed with a caption; 0 disables packing."""
    none_probability: Fraction = 0.4
    """Probability of packing no text."""
    full_probability: Fraction = 0.5
    """Probability, if any text is packed, of packing `number`; otherwise the count is uniform in 0 ... number - 1."""
    take: Literal["captions", "phrases", "names"] = "captions"
    """Source of the texts: `captions` of other records of the same source, their `phrases` with boxes, or `negatives`."""
    kinds: tuple[Literal["pseudo", "grounding"], ...] = ("pseudo",)
    """Kinds of records whose captions are packed."""


@dataclass(frozen=True)
class DescriptionsConfig:
    """Descriptions of names, which help with names that were never seen in training: their words were."""

    file: AssetStr = ""
    """JSON of a text, or a list of texts, by name: {"zebra": "striped animal"}. Local, gs://, or package:glip_jax/gcs/sample/descriptions.json,
    which has the names of the synthetic scenes. Needed for `use` and `loss.description_weight`."""
    use: Literal["none", "prompt", "mean"] = "none"
    """`prompt`: a name of a detection prompt is followed by its first description, as in "zebra, striped animal. "; its span is the name
    alone, and fewer names fit the token budget. `mean`: before fusion the text states of a name are averaged with those of its
    descriptions, each encoded alone and pooled; trains only with `model.text.frozen`. Captions keep their text."""
    probability: Fraction = 0.5
    """Share of the training prompts with descriptions (`prompt`), so that bare names are learned too. Evaluation and prediction always have them."""


@dataclass(frozen=True)
class CaptionConfig:
    """How the caption of a record is built. Defaults are those of the original code (glip-reference 1.7 and 4.2).

    The number of negative names is n = min(`max_negatives`, available names) with `full_probability`, 1 with
    `one_negative_probability`, 0 with `one_positive_probability`, and otherwise uniform in 1 ... n.
    """

    mode: Literal["sampled", "all_names"] = "sampled"
    """`sampled`: positives and sampled negatives; `all_names`: every category of the source, as in fine-tuning (4.3)."""
    separator: str = ". "
    """Text between two names of a caption."""
    max_negatives: Limit = 85
    """Maximum number of negative names in a caption."""
    full_probability: Fraction = 0.5
    one_negative_probability: Fraction = 0.0
    one_positive_probability: Fraction = 0.0
    drop_positive_probability: Fraction = 0.0
    """Probability of keeping a random subset of the positive names (uniform size, at least 1) and only their boxes. The
    original code has this option but accepts only 0."""
    empty_probability: Fraction = 0.0
    """Probability of a prompt that names nothing of the image: negatives alone, without a box. Without it a network never sees that nothing
    is there. Grounding and pseudo records take the names that they know to be absent (`known_absent`) and the `negatives` of their source;
    those without any keep their caption, as do detection records without a negative."""
    hard_share: Fraction = 0.0
    """Fraction of hard negatives: names or packed phrases that are most like the positives."""
    hard_by: Literal["letters", "meaning"] = "letters"
    """What likeness is: `letters`, shared words and letters; `meaning`, the cosine of states of the text encoder as it is before training
    (mean over the tokens of a name, without the mean of all names)."""
    dictionary: Fraction = 0.0
    """Share of the negatives that come from the names of all sources, by frequency, where they are known to be absent: a source's own names,
    its `negatives`, `known_absent` of a record, and all others where the source has `complete="all"`. Names with the words of a positive,
    more or fewer, are left out. Captions take them in empty prompts and with `packing.take="names"`."""
    synonym_cosine: Fraction = 0.5
    """With `hard_by="meaning"`: cosine to a positive above which a name of another source counts as a synonym and is no negative."""
    look_alikes: Fraction = 0.0
    """Probability that a caption gets a second, negative text: one of its phrases with another color, material, size or side ("a yellow apple" for "a red
    apple"). It is negative at the boxes of the caption; elsewhere it gives no loss, unless the source has `complete="all"` and color or
    material was changed. Sides are changed only where images are neither mirrored (`flip_captions="safe"` or no flip) nor cropped."""
    shuffle: bool = True
    """Shuffle the names of a caption."""
    words_without_box: Literal["negative", "unknown"] = "negative"
    """Words of grounding and pseudo captions that belong to no phrase with a box: `negative` at every anchor, as in the
    original, or `unknown`, which removes their loss at anchors without a box."""
    packing: PackingConfig = PackingConfig()
    descriptions: DescriptionsConfig = DescriptionsConfig()


@dataclass(frozen=True)
class CropConfig:
    """Random crop before the resize. The original code has none."""

    probability: Fraction = 0.0
    """Probability of cropping an image."""
    min_side: Annotated[float, Range(0, 1, above=True)] = 0.5
    """Minimum fraction of height and of width that is kept; each is uniform in min_side ... 1."""
    min_visible: Fraction = 0.4
    """Minimum visible fraction of a box's area. Boxes below it are dropped and counted as `boxes_out_of_view`."""


@dataclass(frozen=True)
class JitterConfig:
    """Random color jitter after the resize. The original code has none. Factors are uniform in 1 - x ... 1 + x."""

    probability: Fraction = 0.0
    """Probability of jittering an image."""
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2
    saturation: Fraction = 0.2
    hue: Fraction = 0.02
    """Hue shift, uniform in -x ... x; 1 is a full turn of the color circle."""


@dataclass(frozen=True)
class DataConfig:
    """The mixture of sources and the preprocessing of an example."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name."""
    captions: CaptionConfig = CaptionConfig()
    short_sides: tuple[Pixels, ...] = (480, 560, 640, 720, 800)
    """Lengths of the short side in pixels; each step uses one of them, in turn."""
    long_side: Pixels = 1333
    """Maximum length of the long side, pixels."""
    aspects: tuple[Annotated[float, Range(0.01, 100)], ...] = (0.666667, 0.75, 1.0, 1.333333, 1.5)
    """Height / width of the canvases. A record uses the nearest one in log scale. Each pair of short side and aspect is one
    compiled shape."""
    codec: Codec = "fast"
    """`pillow` gives the pixels of the original code at a third of the speed."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    flip_captions: Literal["as_is", "safe"] = "as_is"
    """`safe`: examples whose caption or names contain "left" or "right" are not flipped. `as_is`: as in the original, every
    example may be flipped."""
    crop: CropConfig = CropConfig()
    jitter: JitterConfig = JitterConfig()
    max_boxes: Annotated[int, Range(1, 100_000)] = 100
    """Box slots per image. Further boxes are dropped and counted as `boxes_over_limit`."""
    workers: Annotated[int, Range(0, 1024)] = runtime_field(0)
    """Grain worker processes; 0: threads of the training process read the data."""
    threads: Annotated[int, Range(1, 1024)] = runtime_field(4)
    """Reader threads, over all worker processes."""
    prefetch: Annotated[int, Range(1, 100_000)] = runtime_field(8)
    """Batches that are prepared ahead."""
    max_corrupt_rate: Fraction = runtime_field(0.01)
    """Training stops if more than this fraction of `corrupt_window` examples of one source is corrupt."""
    corrupt_window: Count = runtime_field(1000)
    """Examples of a source per window in which corrupt records are counted."""


def data_checks(data: DataConfig) -> list[tuple[bool, str]]:
    """Checks of the data settings: (fits, message if it does not)."""
    captions = data.captions
    total = captions.full_probability + captions.one_negative_probability + captions.one_positive_probability
    checks = [
        (not captions.empty_probability or captions.mode == "sampled",
         f"data.captions.empty_probability is {captions.empty_probability}, and mode all_names puts every name into every prompt: leave one out"),
        (not captions.dictionary or captions.mode == "sampled",
         f"data.captions.dictionary is {captions.dictionary}, and mode all_names puts every name into every prompt: leave one out"),
        (captions.hard_by == "letters" or captions.mode == "sampled",
         f"data.captions.hard_by is {captions.hard_by}, and mode all_names draws no negatives: leave one out"),
        (captions.hard_by == "letters" or bool(captions.hard_share or captions.dictionary),
         f"data.captions.hard_by is {captions.hard_by}, hard_share {captions.hard_share} and dictionary {captions.dictionary}: nothing uses it; "
         "expected one of them above 0"),
        (captions.descriptions.use == "none" or bool(captions.descriptions.file),
         f"data.captions.descriptions.use is {captions.descriptions.use!r}, and data.captions.descriptions.file is empty: name the JSON of descriptions"),
        *((bool(getattr(data, name)), f"data.{name} is empty: expected at least one number") for name in ("short_sides", "aspects")),
        (total <= 1 + 1e-9,
         f"data.captions: full_probability {captions.full_probability}, one_negative_probability {captions.one_negative_probability} "
         f"and one_positive_probability {captions.one_positive_probability} add up to {total:g}: expected at most 1"),
    ]  # fmt: skip
    copied = [name for name, source in data.sources.items() if source.copies]
    for name, source in data.sources.items():
        checks += [
            (not source.copies or source.weight == 1.0,
             f"data.sources.{name} has weight {source.weight} and copies {source.copies}: set only one of them"),
            (bool(source.copies) == bool(copied),
             f"data.sources.{name} has weight {source.weight}, data.sources.{copied[0] if copied else ''} has copies: "
             "set weight for all sources, or copies for all"),
        ]  # fmt: skip
    return checks
