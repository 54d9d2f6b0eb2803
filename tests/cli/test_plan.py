"""The job `plan`: bad input in one line, JSON, choice of the compiler, the search's ranking."""

import json

import pytest

from glip_jax import __main__
from glip_jax.cli import plan
from glip_jax.distributed import exit_codes
from glip_jax.planning.compile import PlanError
from glip_jax.planning.statistics import CompileStatistics
from tests import tiny_run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(tiny_run.config_file(tmp_path_factory.mktemp("config"), {}))


def run(config, *arguments):
    return __main__.main(["plan", f"--config={config}", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "plan: no chips: expected --topology=v5e:8x16"),
        (("--topology=v9:2x2",), "plan: topology 'v9:2x2': expected one of v4, v5e"),
        (("--topology=v5e:2x2", "--canvas=64"), "plan: --canvas=64: expected HEIGHTxWIDTH in multiples of 32"),
        (("--topology=v5e:2x2", "--canvas=64x96,64x65"), "plan: --canvas=64x65"),
        (("--topology=h100:8", "--compile=tpu"), "plan: --compile=tpu: h100:8 is no TPU"),
        (
            ("--topology=v5e:2x2", "--compile=none", "--out=gs://x/y.json"),
            "plan: --out=gs://x/y.json: expected the name of",
        ),
        (
            ("--topology=v5e:2x2", "--compile=fake", "--search", "--canvas=64x64,64x96"),
            "plan: --search takes one --canvas, found 2",
        ),
        pytest.param(
            ("--topology=h100:1", "--compile=local"),
            "plan: h100:1: --compile=local is for a machine with such GPUs",
            marks=pytest.mark.processes,
        ),
        (("--topology=h100:8", "--search"), "plan: --search wants a compiler, and none is used for h100:8"),
        (("--topology=v5e:2x2", "--compile=fake", "--search", "--search-remat=some"), "plan: --search-remat=some"),
        (("--topology=v5e:2x2", "--compile=none", "--config.mesh.fsdp=3"), "plan: mesh is"),
        (("--topology=v5e:2x2", "--compile=none", "--config.mesh.tensor=2"), "plan: mesh.tensor is 2: formulas do not"),
        (("--topologie=v5e:2x2",), "plan: unknown option --topologie; did you mean --topology"),
    ],
)
def test_bad_input_is_one_line(config, capsys, arguments, message):
    assert run(config, *arguments) == exit_codes.BAD_INPUT
    output = capsys.readouterr().err
    assert output.startswith(message) and output.count("\n") == 1


def test_a_file_that_cannot_be_written_is_found_before_anything_is_compiled(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path, "it is a folder"), (tmp_path / "file" / "plan.json", "")):
        assert run(config, "--topology=v5e:2x2", "--compile=fake", f"--out={out}") == exit_codes.BAD_INPUT
        output = capsys.readouterr().err
        assert output.startswith(f"plan: --out={out} cannot be written ({reason}") and output.count("\n") == 1


@pytest.mark.compiles
def test_a_batch_for_fewer_chips_is_planned_with_an_image_on_each(config, capsys):
    assert run(config, "--topology=v5e:4x4", "--compile=none", "--canvas=64x64") == exit_codes.DONE
    output = capsys.readouterr()
    assert output.err.startswith(
        "plan: train.batch_size 8 does not split over 16 chips (a multiple of 16 does), and `train`"
    )
    assert "16 images a step (1 a chip)" in output.out and "3 steps: " in output.out
    assert run(config, "--topology=v5e:2x2", "--compile=none", "--canvas=64x64") == exit_codes.DONE
    output = capsys.readouterr()
    assert output.err == "" and "8 images a step (2 a chip)" in output.out


@pytest.mark.compiles
def test_without_a_compiler_it_says_which_would_do(config, capsys):
    assert run(config, "--topology=h100:8", "--canvas=64x64") == exit_codes.DONE
    assert "--compile=fake compiles for fake CPU devices" in capsys.readouterr().out


@pytest.mark.compiles
def test_formulas_and_json(config, capsys, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ("--topology=a100:8", "--images-per-chip=2", "--canvas=64x64,64x96", f"--out={out}")
    assert run(config, *arguments) == exit_codes.DONE
    output = capsys.readouterr().out
    assert output.count("16 images a step (2 a chip)") == 2 and "nothing compiled" in output
    first, second = json.loads(out.read_text())
    assert first["topology"]["chips"] == 8 and first["canvas"] == [64, 64] and first["compiled"] is None
    assert first["roofline"]["useful_flops"] < second["roofline"]["useful_flops"]
    assert "3 steps: " in output, "six steps of 8 are three of 16"
    assert first["roofline"]["fits"] is None and first["scaling"] is None


@pytest.mark.compiles
def test_without_libtpu_it_says_what_to_install_and_goes_on(config, capsys, monkeypatch):
    wanted = []

    def compile_step(config, chips, canvas, how, *_):
        wanted.append(how)
        return CompileStatistics(how, "jaxlib", arguments=1e6, temporaries=1e6, flops=1e9, passes=1e9, bytes=1e9)

    monkeypatch.setattr(plan, "_has_libtpu", lambda: False)
    monkeypatch.setattr(plan, "compile_step", compile_step)
    assert run(config, "--topology=v5e:2x2") == exit_codes.DONE
    output = capsys.readouterr()
    assert wanted == ["fake"] and "pip install -r requirements-tpu.txt" in output.err
    assert "temporaries and bytes are those of a CPU program" in output.out
    assert run(config, "--topology=v5e:2x2", "--compile=tpu") == exit_codes.BAD_INPUT
    assert "libtpu is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.compiles
def test_search_ranks_what_fits(config, capsys, monkeypatch, tmp_path):
    """A made-up compiler: temporaries grow with images, remat makes them smaller and the step longer."""
    asked = []

    def compile_step(config, chips, canvas, how, *_):
        own, remat = config.train.batch_size // 4, config.model.remat
        asked.append((own, remat, config.mesh.fsdp))
        size = own * (10e9 if remat == "none" else 3e9)
        flops = own * 1e12 * (1.0 if remat == "none" else 1.3)
        return CompileStatistics(how, "made up", arguments=1e9, temporaries=size, flops=flops, passes=flops, bytes=1e9)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    out = tmp_path / "search.json"
    arguments = ("--search", "--search-images=1,2,4", "--search-remat=none,blocks", "--search-fsdp=1,3", f"--out={out}")
    assert run(config, "--topology=v5e:2x2", "--compile=fake", "--config.data.workers=8", *arguments) == exit_codes.DONE
    output = capsys.readouterr().out
    assert "4 images a chip, remat none, fsdp 1, tensor 1: skipped, 2 images do not fit" in output
    assert "fsdp 3, tensor 1: mesh is" in output, "a mesh that does not divide is left out with its reason"
    assert asked == [(1, "none", 1), (2, "none", 1), (1, "blocks", 1), (2, "blocks", 1), (4, "blocks", 1)]
    tried = json.loads(out.read_text())
    rates = [t["roofline"]["images_per_second"] for t in tried[:4]]
    assert tried[0]["remat"] == "none" and rates == sorted(rates, reverse=True) and rates[0] > rates[1]
    assert all(t["roofline"]["fits"] for t in tried[:4]) and not tried[4]["roofline"]["fits"]
    assert tried[-1]["roofline"] is None


@pytest.mark.slow
@pytest.mark.compiles
def test_a_search_tries_what_splits_widths(config, capsys, monkeypatch):
    """Two chips that share an image's work have two images together: as many a chip as without."""
    asked = []

    def compile_step(config, chips, canvas, how, *_):
        asked.append((config.train.batch_size, config.mesh.tensor))
        return CompileStatistics(how, "made up", arguments=1e9, flops=1e12, passes=1e12, bytes=1e9)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    arguments = ("--search", "--search-images=1", "--search-remat=none", "--search-fsdp=2", "--search-tensor=1,2,4")
    assert run(config, "--topology=v5e:2x2", "--compile=fake", *arguments) == exit_codes.DONE
    assert asked == [(4, 1), (4, 2)]
    output = capsys.readouterr().out
    assert "fsdp 2, tensor 4: mesh is" in output and "images a chip  remat        fsdp  tensor" in output
    assert (
        run(config, "--topology=v5e:2x2", "--compile=fake", "--images-per-chip=1", "--config.mesh.tensor=2")
        == exit_codes.DONE
    )
    assert asked[-1] == (4, 2) and "(1 a chip)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.compiles
def test_a_search_goes_on_after_a_compiler_that_died(config, capsys, monkeypatch):
    def compile_step(config, chips, canvas, how, *_):
        if config.train.batch_size == 8 or config.model.remat == "blocks":
            raise PlanError("the compiler ended without an answer")
        return CompileStatistics(how, "made up", arguments=1e9, flops=1e12, passes=1e12, bytes=1e9)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    arguments = ("--search", "--search-images=1,2", "--search-fsdp=1", "--topology=v5e:2x2", "--compile=fake")
    assert run(config, *arguments, "--search-remat=none") == exit_codes.DONE
    assert "ended without an answer" in capsys.readouterr().out
    assert run(config, *arguments, "--search-remat=blocks") == exit_codes.BAD_INPUT, "all died"
    assert capsys.readouterr().err == "plan: the compiler ended without an answer\n"


def test_the_largest_canvas_is_the_default():
    data = tiny_run.replace(tiny_run.config(), "data", short_sides=(64, 128), long_side=256, aspects=(1.0, 0.5, 2.0))
    assert plan.canvases(data)[0] == (128, 256)


def test_a_config_that_is_wrong_is_no_plan(config, capsys):
    assert run(config, "--topology=v5e:2x2", "--config.train.steps=0") == exit_codes.BAD_INPUT
    assert capsys.readouterr().err.startswith("plan: train.steps is 0")
