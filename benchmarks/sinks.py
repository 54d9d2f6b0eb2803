"""What attention sinks (`detection.sinks`) do to false alarms and AP of a checkpoint, by their number and what they say.

    python -m benchmarks.sinks --checkpoint=runs/demo --set=absent --images=64

The set is one of the checkpoint's `evaluation.sets` whose images list absent names. A row: with all names of the set in the usual
prompts AP and, from a score of 0.3 on, the share of (image, absent name) pairs with a box, and of (image, present name) pairs; the last two
again with one name a prompt. Choose on images that are not those of the report.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from glip_jax.config import Config
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.evaluation.evaluate import Evaluated, evaluate_set
from glip_jax.evaluation.single_names import single_name_absence
from glip_jax.inference import Detector
from glip_jax.inference.sinks import RANDOM
from glip_jax.io.checkpoint import open_checkpoint

SCORE = "0.3"


def variants(counts: Sequence[int], starts: Sequence[str], seeds: Sequence[int]) -> list[tuple[int, str, int]]:
    """(number, start, seed) of each row: none, then every number with every text, and random numbers of every seed."""
    given = [(start, seed) for start in starts for seed in (seeds if start == RANDOM else (0,))]
    return [(0, RANDOM, 0), *((count, start, seed) for count in counts for start, seed in given)]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sinks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="WORKDIR of a run")
    parser.add_argument("--set", default="absent", help="one of its evaluation.sets")
    parser.add_argument("--images", type=int, default=64, help="first images of the set")
    parser.add_argument("--sinks", type=int, nargs="+", default=[8], help="numbers of sinks")
    parser.add_argument("--starts", nargs="+", default=[RANDOM], help="random, or texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of random numbers")
    arguments = parser.parse_args(argv)
    checkpoint = open_checkpoint(arguments.checkpoint)
    config: Config = checkpoint.config
    if arguments.set not in config.evaluation.sets:
        parser.error(f"--set={arguments.set}: the checkpoint has {', '.join(config.evaluation.sets) or 'no set'}")
    enable_compilation_cache()
    dataset = config.evaluation.sets[arguments.set]
    limited = dataclasses.replace(config.evaluation, max_images=arguments.images)
    parameters = checkpoint.parameters(config.evaluation.parameters)
    print("| sinks | start | seed | AP | alarmed | found | alone: alarmed | found |\n|---|---|---|---|---|---|---|---|")
    for count, start, seed in variants(arguments.sinks, arguments.starts, arguments.seeds):
        detection = dataclasses.replace(config.detection, sinks=count, sink_start=start, sink_seed=seed)
        own = dataclasses.replace(config, detection=detection, evaluation=limited)
        detector = Detector(own, parameters)
        result = evaluate_set(detector, own, dataset, name=arguments.set)
        if not isinstance(result, Evaluated) or result.absence is None:
            parser.error(f"--set={arguments.set}: its images list no absent names")
        alone = single_name_absence(detector, own, dataset, result, 1)
        shares = [measured["thresholds"][SCORE] for measured in (result.absence, alone)]
        cells = [f"{each[key]:.3f}" for each in shares for key in ("alarmed_pairs", "found_pairs")]
        print(f"| {count} | {start} | {seed} | {result.absence['AP']:.4f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
