"""scripts/slurm.sbatch with fake srun and scontrol that record their arguments; the container file; the xpk command."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glip_jax.distributed import exit_codes

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "scripts/pretrain.sh"
ODD = ["--config=a b.py", "--workdir=/runs/it's $HOME;x", '--config.name="q"', ""]


@pytest.fixture
def job(tmp_path):
    """Gives the script to a checkout of its own, as SLURM does: (exit code, what it said, what was asked)."""
    checkout, bin_ = tmp_path / "a checkout", tmp_path / "bin"
    (checkout / "scripts").mkdir(parents=True)
    bin_.mkdir()
    (checkout / "scripts" / "environment.sh").write_text('environment() { echo "environment $1" >>"$ASKED"; }\n')
    copy = tmp_path / "slurm_script"
    shutil.copy(ROOT / "scripts" / "slurm.sbatch", copy)
    for name, end in (("srun", 'exit "$CODE"'), ("scontrol", "exit 0")):
        tool = bin_ / name
        tool.write_text(
            f'#!/usr/bin/env bash\nprintf "{name}" >>"$ASKED"\nprintf "|%s" "$@" >>"$ASKED"\necho >>"$ASKED"\n{end}\n'
        )
        tool.chmod(0o755)

    def give(*arguments, code=0, **variables):
        asked = tmp_path / "asked"
        asked.write_text("")
        settings = {"ASKED": str(asked), "CODE": str(code), "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        settings |= {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_CPUS_PER_TASK": "12", **variables}
        command = ["bash", str(copy), *arguments]
        done = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, asked.read_text().splitlines()

    return give


def test_each_task_gets_unmodified_arguments(job):
    code, said, (environment, srun) = job(*ODD)
    assert code == 0 and environment == "environment requirements-gpu.txt", said
    wanted = ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=12", "scripts/pretrain.sh", "--distributed", *ODD]
    assert srun.split("|") == wanted


@pytest.mark.parametrize(
    ("code", "count", "again"),
    [(75, "3", True), (75, "99", True), (69, "0", True), (76, "19", True), (137, "0", True), (143, "0", True)]
    + [(76, "20", False), (1, "0", False), (2, "0", False), (130, "0", False), (0, "0", False)],
)
def test_transient_errors_are_requeued(job, code, count, again):
    found, said, asked = job("--config=c.py", code=code, SLURM_RESTART_COUNT=count)
    assert found == code and f"exit code {code}" in said
    assert ("scontrol|requeue|7" in asked) == again


def test_a_dry_run_prints_commands(job, tmp_path):
    code, said, asked = job("--dry-run", *ODD, SLURM_CPUS_PER_TASK="")
    assert code == 0 and asked == []
    assert "a\\ checkout && export GLIP_JAX_REQUIREMENTS=requirements-gpu.txt" in said.splitlines()[0]
    (line,) = [each for each in said.splitlines() if each.startswith("srun ")]
    again = subprocess.run(
        ["bash", "-c", f"set -- {line}; printf '%s|' \"$@\""], capture_output=True, text=True, check=True
    )
    assert again.stdout.split("|")[:-1] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--cpus-per-task=12",
        "scripts/pretrain.sh",
        "--distributed",
        *ODD,
    ]


@pytest.mark.parametrize(
    ("arguments", "place", "message"),
    [
        ((), None, "slurm.sbatch: expected --config=configs/NAME.py --workdir=DIR"),
        (("--config=c.py",), "", "slurm.sbatch is given to sbatch, which says where the checkout is"),
        (("--config=c.py",), "/", "slurm.sbatch: / is not a checkout of glip_jax"),
    ],
)
def test_invalid_jobs_give_a_one_line_error(job, arguments, place, message):
    code, said, asked = job(*arguments, **({} if place is None else {"SLURM_SUBMIT_DIR": place}))
    assert code != 0 and message in said and len(said.splitlines()) == 1 and asked == []


def test_files_of_the_container_exist():
    """The image itself is not built here: no builder, no base image."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if not word.startswith("--")
    ]
    for pattern in copied:
        assert pattern == "." or list(ROOT.glob(pattern)), pattern
    for name in re.findall(r"requirements[\w-]*\.txt", "\n".join(lines)):
        assert (ROOT / name).is_file(), name
    (entry,) = re.findall(r'ENTRYPOINT \["(.*)"\]', "\n".join(lines))
    assert entry == ENTRY and os.access(ROOT / entry, os.X_OK)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= {each.strip("/") for each in ignored}


def test_gke_restarts_after_the_same_exit_codes():
    """The documented command for xpk: its exit codes are those of slurm.sbatch and on_host.sh, its command the container's."""
    (command,) = re.findall(
        r"xpk workload create (?:.*\\\n)+.*", (ROOT / "docs" / "tutorials" / "tpu-pod.md").read_text()
    )
    (codes,) = re.findall(r"--restart-on-exit-codes=([\d,]+)", command)
    for script in ("slurm.sbatch", "on_host.sh"):
        text = (ROOT / "scripts" / script).read_text()
        again = [code for code in range(1, 256) if _starts_again(text, code)]
        assert again == [int(code) for code in codes.split(",")], script
    assert f'--command="{ENTRY} --distributed $RUN"' in command


def _starts_again(text, code):
    """By the patterns that a script holds exit codes against: an expression, or a case."""
    found = re.findall(r"=~ \^(\([\d|\[\]]+\))\$", text) or re.findall(r"^ +(69[ |\d]+)\)$", text, re.MULTILINE)
    assert len(found) == 1, "the pattern of codes is written in another way now"
    return code == exit_codes.PREEMPTED or re.fullmatch(found[0].replace(" ", ""), str(code)) is not None
