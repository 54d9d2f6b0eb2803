"""A checkout and a fake Google Cloud for tests of scripts/tpu.sh, both in a folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Replaces pretrain.sh: records its arguments, separated by NUL, then does what the next word of `plan` in its home says.
PRETRAIN = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$HOME/arguments"
echo "$GLIP_JAX_REQUIREMENTS" >"$HOME/requirements"
read -r next <"$HOME/plan"
sed -i 1d "$HOME/plan"
echo "step 20/100  loss 1.5"
[ "$next" != wait ] || exec python3 -S -c 'import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("waiting", flush=True)
time.sleep(60)'
exit "$next"
"""
ENVIRONMENT = """find_python() { echo python3; }
environment() { mkdir -p .venv; echo "pip speaks"; test ! -e "$HOME/pip fails"; echo "$1" >.venv/made; }
"""


def _commit(root):
    me = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["add", "--all"], ["commit", "--quiet", "-m", "c"]):
        subprocess.run(["git", "-C", root, *me, *arguments], check=True)


def make_project(root):
    """A checkout with the scripts under test, and replacements of those that train and install."""
    (root / "scripts").mkdir()
    (root / "gcs").mkdir()
    for name in ("scripts/tpu.sh", "scripts/on_host.sh", "gcs/lifecycle.json"):
        shutil.copy(ROOT / name, root / name)
    (root / "scripts/pretrain.sh").write_text(PRETRAIN)
    (root / "scripts/environment.sh").write_text(ENVIRONMENT)
    (root / "old name.txt").write_text("of the first commit")
    (root / ".gitignore").write_text(".venv/\n")
    subprocess.run(["git", "init", "--quiet", "--template=", root], check=True)
    _commit(root)


class Cloud:
    """A project with scripts and a commit, and a Google Cloud, both in a folder."""

    def __init__(self, path, project):
        self.path, self.root, self.google = path, path / "project with a space", path / "google"
        shutil.copytree(project, self.root)
        self.google.mkdir()
        commands = path / "bin"
        commands.mkdir()
        fake = commands / "gcloud"
        fake.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {ROOT / "tests/scripts/fake_gcloud.py"} "$@"\n')
        fake.chmod(0o755)
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(path),
            "FAKE_GCLOUD": str(self.google),
            "TPU_ZONE": "us-west4-a",
            "TPU_PROJECT": "p",
            "TPU_POLL_SECONDS": "0",
            "GLIP_JAX_STOP_SECONDS": "20",
            "GLIP_JAX_RESTART_SECONDS": "0.1",
        }

    def commit(self):
        _commit(self.root)

    def __call__(self, *arguments, code=0, **environment):
        done = subprocess.run(
            ["bash", self.root / "scripts/tpu.sh", *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def calls(self):
        file = self.google / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def hosts(self):
        return sorted((self.google / "hosts").iterdir())

    def plan(self, *words):
        for host in self.hosts():
            (host / "plan").write_text("".join(f"{word}\n" for word in words))

    def fault(self, match, message, code):
        (self.google / "faults.json").write_text(json.dumps([{"match": match, "message": message, "code": code}]))

    def wait_for(self, text, file):
        """The output of `status` once each host has `file` in its state; the line of every host must contain `text`."""
        for host in self.hosts():
            for _ in range(400):
                if (host / "glip_jax.state" / file).exists():
                    break
                time.sleep(0.05)
        said = self("status", "pod")
        assert said.count(text) == len(self.hosts()), said
        return said
