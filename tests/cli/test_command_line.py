"""The command line: overrides, nearest names, one clear message for each mistake; the table of jobs."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import tyro

from glip_jax.__main__ import JOBS, main
from glip_jax.cli.command_line import Arguments, CommandLineError, flags, parse
from glip_jax.config import ConfigError
from glip_jax.distributed import exit_codes

FILE = """
from glip_jax.config import Config, DataConfig, SourceConfig

def get_config():
    return Config(name="x", data=DataConfig(sources={"goldg": SourceConfig("a"), "coco_cc": SourceConfig("b")}))
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "x.py").write_text(FILE)
    return f"--config={tmp_path / 'x.py'}"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("--config.model.fusion.width=64", lambda c: c.model.fusion.width == 64),
        ("--config.model.fusion.enabled=False", lambda c: c.model.fusion.enabled is False),
        ("--config.model.dtype=bfloat16", lambda c: c.model.dtype == "bfloat16"),
        ("--config.data.sources.goldg.weight=2", lambda c: c.data.sources["goldg"].weight == 2.0),
        ("--config.data.sources.coco_cc.weight=3", lambda c: c.data.sources["coco_cc"].weight == 3.0),
        ("--config.data.short_sides=100,200", lambda c: c.data.short_sides == (100, 200)),
        ("--config.data.short-sides=(100,)", lambda c: c.data.short_sides == (100,)),
        (
            "--config.data.sources.goldg.negatives=mug (cup),bow_(decorative_ribbons)",
            lambda c: c.data.sources["goldg"].negatives == ("mug (cup)", "bow_(decorative_ribbons)"),
        ),
        (
            "--config.data.sources.goldg.negatives=(mug),(bow, red)",
            lambda c: c.data.sources["goldg"].negatives == ("(mug)", "(bow, red)"),
        ),
        (
            '--config.data.sources.goldg.negatives="salt, pepper", mug',
            lambda c: c.data.sources["goldg"].negatives == ("salt, pepper", "mug"),
        ),
        (
            "--config.data.sources.goldg.negatives=('salt, pepper', 'mug')",
            lambda c: c.data.sources["goldg"].negatives == ("salt, pepper", "mug"),
        ),
        ("--config.optimizer.milestones=0.5", lambda c: c.optimizer.milestones == (0.5,)),
        ("--config.mesh.data=-1", lambda c: c.mesh.data == -1),
        ("--config.optimizer.rate=1e-3", lambda c: c.optimizer.rate == 1e-3),
    ],
)
def test_overrides(config, override, read):
    parsed = parse([config, override, "--workdir=/runs/1"])
    assert read(parsed.config) and parsed.workdir == "/runs/1" and parsed.config.name == "x"


@dataclass(frozen=True)
class _More(Arguments):
    resume_with_changes: bool = False


def test_flags_of_a_job(config):
    assert parse([config, "--resume-with-changes"], _More).resume_with_changes
    assert not parse([config], _More).resume_with_changes
    with pytest.raises(CommandLineError, match="did you mean --resume-with-changes"):
        parse([config, "--resume-with-change"], _More)
    with pytest.raises(CommandLineError, match="unknown option --confg; did you mean --config"):
        parse(["--confg=a.py", "--config.data.sources.x.weight=2"], _More)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--config.model.fusion.widht=3", "--config.model.fusion.width"),
        ("--config.model.fusion.layers=3", "--config.model.text.layers"),
        ("--config.data.sources.coco_c.weight=3", "--config.data.sources.coco_cc.weight"),
        ("--config.train.setps=3", "--config.train.steps"),
        ("--work-dir=3", "--workdir"),
    ],
)
def test_misspelt_names_get_the_nearest(config, option, nearest):
    with pytest.raises(CommandLineError, match="did you mean") as caught:
        parse([config, option])
    assert nearest in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"absent.py: no such file; did you mean .*present.py"),
        ("x = 1", r"no get_config\(\) in the file"),
        ("def get_config(): return 3", r"get_config\(\) returned int, expected Config"),
        ("def get_config(:", r"line 1: SyntaxError"),
        ("\ndef get_config():\n    return 1 / 0", r"line 3: ZeroDivisionError"),
        ("import nowhere_to_be_found", r"line 1: ModuleNotFoundError"),
    ],
)
def test_a_bad_config_file_gets_one_line(tmp_path, content, message):
    (tmp_path / "present.py").write_text(FILE)
    if content is not None:
        (tmp_path / "absent.py").write_text(content)
    with pytest.raises(CommandLineError, match=message) as caught:
        parse([f"--config={tmp_path / 'absent.py'}"])
    assert "\n" not in str(caught.value)


def test_no_config_and_settings_that_do_not_fit(config):
    with pytest.raises(CommandLineError, match=r"expected --config=configs/NAME.py"):
        parse([], job="train")
    with pytest.raises(ConfigError, match=r"weight is 0.0: expected more than 0, .*remove a source"):
        parse([config, "--config.data.sources.goldg.weight=0"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.train.steps=many", "--config.train.steps=many: expected an integer"),
        ("--config.optimizer.rate=fast", "--config.optimizer.rate=fast: expected a number"),
        ("--config.mesh.data=1.5", "--config.mesh.data=1.5: expected an integer"),
        ("--config.data.short_sides=1,x", "--config.data.short-sides=1,x: expected integers: 1,2,3"),
        ("--config.model.dtype=half", r"'half' for argument '--config.model.dtype'. Expected one of \('float32'"),
        ("--config.model.fusion.enabled=yes", r"'yes' for argument .*Expected one of \('True', 'False'\)"),
        ("--config.train.steps", "Missing value for argument '--config.train.steps'"),
        ("more", "unknown argument 'more'"),
    ],
)
def test_a_wrong_type_gets_one_line(config, option, message):
    with pytest.raises(CommandLineError, match=message) as caught:
        parse([config, option], job="train")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("python -m glip_jax train --help lists all")


@dataclass(frozen=True)
class Colours:
    red: int = 0


@dataclass(frozen=True)
class Cats:
    """Import cats."""

    file: tyro.conf.Positional[str]
    """Where they are."""
    number: int = 1
    of: Colours = field(default_factory=Colours)


@dataclass(frozen=True)
class Dogs:
    """Import dogs."""


Pets = Annotated[Cats, tyro.conf.subcommand("cats")] | Annotated[Dogs, tyro.conf.subcommand("dogs")]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Cats, ["a", "--numbr=3"], "unknown option --numbr; did you mean --number?"),
        (Cats, ["a", "--number=x"], "--number=x: expected an integer; "),
        (Cats, ["a", "--of.rde=2"], "unknown option --of.rde; did you mean --of.red?"),
        (Cats, [], "missing: STR Where they are; python -m glip_jax pets --help"),
        (Pets, ["cast", "a"], "unknown format 'cast'; did you mean cats?"),
        (Pets, ["cats", "a", "--nmuber=2"], "did you mean --number?"),
        (Pets, [], "Expected one of {cats, dogs}"),
    ],
)
def test_flags_that_do_not_fit_get_one_line(kind, arguments, message):
    with pytest.raises(CommandLineError) as caught:
        flags(arguments, kind, "pets")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flags():
    assert flags(["x", "--number=3"], Cats, "pets") == Cats("x", 3)
    assert flags(["x", "--of.red=2"], Cats, "pets").of == Colours(2)
    assert flags(["cats", "x"], Pets, "pets") == Cats("x")


@pytest.mark.parametrize("job", JOBS)
def test_help_teaches(job, capsys):
    with pytest.raises(SystemExit) as caught:
        main([job, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"example: python -m glip_jax {job} " in out and "75 stopped by SIGTERM (saved: run again)" in out


def test_the_entry_point_lists_jobs_and_proposes_the_nearest(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(job in out for job in JOBS)
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "there are: data" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.processes
@pytest.mark.parametrize("options", [["benchmark", "--list"], ["score", "--help"]])
def test_a_reader_that_ends_early_is_no_fault(options):
    """`| head`: the output is longer than a pipe holds, or flushed when the job has ended."""
    job = subprocess.Popen(
        [sys.executable, "-m", "glip_jax", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert (job.stderr.read(), job.wait()) == ("", exit_codes.OUTPUT_CLOSED)


@pytest.mark.processes
def test_the_entry_point_is_a_program():
    run = subprocess.run([sys.executable, "-m", "glip_jax", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "train" in run.stdout


_LIGHT = ("predict", "evaluate", "label", "export", "import", "data")
_HELP = f"""
import contextlib, io, sys
from glip_jax.__main__ import main
for job in {_LIGHT}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([job, "--help"])
    heavy = [name for name in ("jax", "flax", "orbax", "optax", "torch", "matplotlib") if name in sys.modules]
    assert not heavy, (job, heavy)
"""


@pytest.mark.processes
def test_help_loads_no_heavy_library():
    run = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_old_flag_works_and_is_named(caplog):
    assert flags(["x", "--count=3"], Cats, "pets", renamed={"--count": "--number"}) == Cats("x", 3)
    assert "--count is renamed: use --number" in caplog.text
