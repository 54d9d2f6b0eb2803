"""The modes of fine-tuning: which parameters each of them trains, and the settings of a run in that mode."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from glip_jax.config import Config, LoraConfig, PromptsConfig
from glip_jax.io.assets import resolve
from glip_jax.structures import prompts

__all__ = ["MODES", "Mode", "ModeName", "prompt_sizes", "tuned_config"]

ModeName = Literal["full", "head", "linear", "prompt", "text", "lora"]


class Mode(NamedTuple):
    """What a mode trains."""

    trainable: tuple[str, ...]
    """Value of `model.trainable`."""
    summary: str
    """The trained parameters in words."""


MODES: dict[ModeName, Mode] = {
    "full": Mode(("*",), "every parameter"),
    "head": Mode(("pyramid/*", "head/*"), "feature pyramid and detection head; both encoders are frozen"),
    # As linear_prob of the original: not the scales of the box deltas.
    "linear": Mode(
        ("head/box/*", "head/centerness/*", "head/projection/*", "head/log_scale", "head/bias_text", "head/bias0"),
        "the output layers of the head",
    ),
    "prompt": Mode(("prompts/deltas",), "text states of the given names (paper section 4)"),
    "text": Mode(("text/*",), "the text encoder"),
    "lora": Mode(("*_lora_a", "*_lora_b"), "low-rank deltas of the attention of BERT, of the head's BERT layers and of the fusion"),
}  # fmt: skip
"""Patterns of the parameters that each mode trains. All others keep their bits."""

_STAGES = {"swin": 4, "efficientnet_lite0": 7}
"""Stages of a backbone."""


def tuned_config(
    config: Config, mode: ModeName, names: Sequence[str] = (), rank: int = 8, scale: float = 2.0
) -> Config:
    """`config` of a base with the network and the trained parameters of `mode`; rates and steps are as they are.

    Frozen encoders run in evaluation mode; where the whole network is frozen (`prompt`), or all but its output layers (`linear`), there
    is no dropout. `full` keeps what the base freezes.

    Args:
        names: `prompt`: the names whose states are tuned.
        rank, scale: `lora`: see `LoraConfig`.

    Raises PromptError for `prompt` without names, or with a name that has no token.
    """
    model = replace(config.model, trainable=MODES[mode].trainable)
    frozen_stages = _STAGES[model.backbone.kind]
    if mode == "full":
        # The norms behind a backbone that the base froze as a whole stay, too, so that its maps can be computed once.
        whole = config.model.backbone.frozen_stages < frozen_stages
        return replace(config, model=model if whole else replace(model, trainable=("pyramid/*", "text/*", "head/*")))
    model = replace(
        model,
        backbone=replace(model.backbone, frozen_stages=frozen_stages, drop_path=0.0),
        text=replace(model.text, frozen=mode not in ("text", "lora")),
    )
    if mode != "head":
        model = replace(model, pyramid=replace(model.pyramid, drop_block=0.0))
    if mode in ("linear", "prompt"):
        model = replace(model, text=replace(model.text, dropout=0.0), fusion=replace(model.fusion, dropout=0.0))
    if mode == "lora":
        model = replace(model, lora=LoraConfig(rank, scale))
    if mode == "prompt":
        model = replace(model, prompts=prompt_sizes(config, names))
    return replace(config, model=model)


def prompt_sizes(config: Config, names: Sequence[str]) -> PromptsConfig:
    """The sizes of a table of tuned prompts for `names`. Raises PromptError for no names, and for one without a token."""
    if not names:
        raise prompts.PromptError("there are no names to tune the prompts of: expected at least one")
    tokenizer = prompts.load_tokenizer(resolve(config.model.text.vocabulary))
    separator = config.data.captions.separator
    counts = []
    for name in names:
        alone = tokenizer.encode(prompts.clean_name(name)).ids
        if len(alone) == 2:
            raise prompts.PromptError(f"the name {name!r} has no token: expected a name with letters")
        counts.append(len(tokenizer.encode(f"{prompts.clean_name(name)}{separator}").ids) - 2)
    return PromptsConfig(len(names), max(counts))
