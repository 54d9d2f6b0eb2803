"""The one door: `python -m glip_jax JOB --config=configs/NAME.py --config.section.field=value --workdir=DIR`."""

import difflib
import importlib
import sys

__all__ = ["JOBS", "main"]

JOBS = {
    "data": "import annotations into shards, and check shards",
    "train": "train, or go on training, in a working folder",
    "evaluate": "evaluate a checkpoint on COCO-style sets",
    "report": "draw the page of a run again from what it recorded",
    "scenes": "make the picture scenes of the demo",
}


def main(argv: list[str]) -> int:
    """Runs the job that `argv` names and returns its exit code; a mistaken command gives one message and code 2."""
    listed = "\n".join(f"  {job:10} {what}" for job, what in JOBS.items())
    usage = f"usage: python -m glip_jax JOB [options]\n\njobs:\n{listed}\n\npython -m glip_jax JOB --help: its options"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    job, *rest = argv
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(JOBS)}"
        print(f"unknown job {job!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"glip_jax.jobs.{job}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
