r"""GLIP-T fine-tuned on a set of ODinW with all its data: the mode `full` of the original (64.9 AP, mean of the 13 sets on test).

    steps    at most 200 epochs, batches of 4
    rates    1e-4, BERT 1e-5 (biases twice that), no warmup; weight decay 0.05; patch embedding and first stage are frozen
    prompt   all names in the order of their ids; short side 800, horizontal flips; no averages

The original cuts the rates when the AP on the validation set does not rise, and stops early. `train` does neither: it runs all epochs and
keeps the best checkpoint. The job that follows the whole recipe, with its other modes and shots, takes any folder:

    python -m glip_jax finetune --data=data/odinw/Aquarium --as-glip=full --checkpoint=... --workdir=...

The set here is Aquarium; `tuned` makes the config of the others.

    python -m glip_jax data coco data/odinw/Aquarium/train/_annotations.coco.json --images=data/odinw/Aquarium/train \
        --out=data/odinw/Aquarium/shards
"""

from dataclasses import replace

from configs import glip_tiny
from glip_jax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    EvaluationSet,
    InitFromConfig,
    SourceConfig,
    TrainConfig,
)

TRAIN_IMAGES = {
    "AerialMaritimeDrone_large": 52, "Aquarium": 448, "CottontailRabbits": 1980, "EgoHands_generic": 3840, "NorthAmericaMushrooms": 41,
    "Packages": 19, "PascalVOC": 13690, "pistols": 2377, "pothole": 465, "Raccoon": 150, "ShellfishOpenImages": 406,
    "thermalDogsAndPeople": 142, "VehiclesOpenImages": 878,
}  # fmt: skip
"""Images of the training splits of ODinW-13 (paper, table 9)."""
EPOCHS, BATCH = 200, 4


def tuned(base: Config, name: str, weights: str, dataset: str = "Aquarium") -> Config:
    """The recipe on the network of `base` for one of `TRAIN_IMAGES`."""
    folder = f"data/odinw/{dataset}"
    epoch = -(-TRAIN_IMAGES[dataset] // BATCH)
    sets = {"valid": EvaluationSet(f"{folder}/valid/_annotations.coco.json", f"{folder}/valid")}
    return replace(
        base,
        name=name,
        model=replace(base.model, backbone=replace(base.model.backbone, frozen_stages=1)),
        init_from=InitFromConfig(model=weights),
        data=replace(
            base.data, sources={"train": SourceConfig(f"{folder}/shards")},
            captions=replace(glip_tiny.SAMPLING, mode="all_names", shuffle=False), short_sides=(800,), long_side=1333, flip=0.5,
        ),
        optimizer=replace(
            base.optimizer, rate=1e-4, text_rate=1e-5, decay=0.05, decay_milestone_factor=1.0, warmup_steps=0, milestones=(),
            ema_decay=0.0,
        ),
        train=TrainConfig(steps=EPOCHS * epoch, batch_size=BATCH, evaluate_every=epoch),
        checkpoint=CheckpointConfig(every=epoch, best=1, best_by="evaluation/valid/AP"),
        evaluation=EvaluationConfig(sets=sets, parameters="raw", short_side=800, long_side=1333),
    )  # fmt: skip


def get_config() -> Config:
    return tuned(glip_tiny.get_config(), "odinw_tiny", "assets/glip_tiny_model_o365_goldg_cc_sbu.pth")
