"""The server as its clients meet it: a tiny run behind a real socket; good, bad, hostile and impatient requests."""

import base64
import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from glip_jax.cli.serve import Serve, _limits, open_socket
from glip_jax.inference import Detector
from glip_jax.io.checkpoint import Checkpoints, Saved
from glip_jax.io.workdir import write_config
from tests import tiny_run
from tests.run_job import run_job

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from glip_jax.cli.serving.app import create_app  # noqa: E402
from glip_jax.cli.serving.service import Model, Service, about, serving_config  # noqa: E402

pytestmark = pytest.mark.compiles
ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny_run.replace(tiny_run.config(), "evaluation", short_side=64, long_side=64, batch_size=2)
CONFIG = tiny_run.replace(CONFIG, "detection", threshold=0.0, max_detections=6)
# Prompts of several lengths.
CONFIG = tiny_run.replace(CONFIG, "model", text=dataclasses.replace(CONFIG.model.text, max_tokens=96, positions=96))
PARAMS = tiny_run.parameters(CONFIG.model)
LIMITS = _limits(Serve(max_images=3, max_names=8, max_megabytes=1, body_seconds=2, seconds=20, queue=12))


@pytest.fixture(scope="module")
def service():
    model = Model("tiny", "0" * 64, 0.3, about("tiny", 3, "0" * 64))
    made = Service(serving_config(CONFIG), PARAMS, model, LIMITS, devices=jax.devices()[:1])
    lines = []
    made.compile(lines.append)
    assert len(lines) == 2 and "canvas 64 x 64" in lines[0]
    return made


class Running:
    """A server in a thread, and its address."""

    def __init__(self, service, **options):
        listening = open_socket("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(service, **options), log_config=None, lifespan="on", timeout_graceful_shutdown=30
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def server(service, tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    (files / "upload").mkdir()
    Image.fromarray(pixels(1)).save(files / "upload" / "one.png")
    (files / "link.png").symlink_to("/etc/hostname")
    (files / ".env").write_text("SECRET_KEY=abc")
    (files / "large.png").write_bytes(bytes(LIMITS.bytes_ + 1))
    running = Running(service, hosts=("127.0.0.1",), files=str(files))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.address, timeout=60) as made:
        yield made


def pixels(seed, height=64, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed=0, height=64, width=64):
    stream = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(stream, "PNG")
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def ask(client, *images, **fields):
    return client.post(
        "/detect", files=[("image", ("a.png", data)) for data in images], data={"threshold": "0", **fields}
    )


def refused(answer, status, text):
    assert answer.status_code == status, answer.text
    assert re.search(text, answer.json()["error"]), answer.text
    assert list(answer.json()) == ["error"] and "\n" not in answer.json()["error"]


def test_detections_are_those_of_the_detector_and_say_who_answers(client, service):
    answer = ask(client, png(1, 60, 50), names="cat,dog").json()
    detector = Detector(CONFIG, None, 2, texts_of=service.batcher.detector, devices=jax.devices()[:1])
    (expected,) = detector([pixels(1, 60, 50)], ["cat", "dog"], threshold=0.0)
    assert [found["name"] for found in answer["detections"]] == expected.names and expected.names
    np.testing.assert_allclose([found["box"] for found in answer["detections"]], expected.boxes, atol=0.02)
    np.testing.assert_allclose([found["score"] for found in answer["detections"]], expected.scores, atol=2e-4)
    assert (answer["width"], answer["height"], answer["phrases"], answer["threshold"]) == (50, 60, ["cat", "dog"], 0)
    assert answer["checkpoint"] == {"name": "tiny", "step": 3, "sha256": "0" * 64}
    assert answer["versions"]["jax"] == jax.__version__ and answer["seconds"] > 0
    middle = answer["detections"][2]["score"]
    kept = ask(client, png(1, 60, 50), names="cat,dog", threshold=str(middle)).json()["detections"]
    assert kept == [found for found in answer["detections"] if found["score"] >= middle] and 0 < len(kept) < len(
        answer["detections"]
    )
    assert ask(client, png(1, 60, 50), names="cat,dog", threshold="").json()["threshold"] == 0.3


def test_nothing_is_compiled_after_the_start(client, service, monkeypatch):
    monkeypatch.setattr(service.batcher, "ratio", 1.0)  # a full batch is taken wherever two images wait
    before = dict(service.batcher.detector.compiled)
    for fields in ({"names": "cat"}, {"names": ",".join(f"red traffic light number {n}" for n in range(8))}, {"text": "a red cup . two dogs"},
                   {"text": "a view of a red cup near a dog"}):  # fmt: skip
        for shape in ((64, 64), (500, 40), (30, 200)):
            assert ask(client, *[png(2, *shape)] * 3, **fields).status_code == 200
    assert dict(service.batcher.detector.compiled) == before


def test_several_images_give_a_list_and_an_array_is_an_image(client):
    answer = ask(client, png(1), npy(pixels(1)), png(3, 40, 64), names='"dog",cat')
    first, second, third = answer.json()
    assert first["detections"] == second["detections"] != third["detections"] and third["height"] == 40


def test_requests_of_many_clients_share_batches_and_get_their_own_answers(client, service, monkeypatch):
    monkeypatch.setattr(service.batcher, "ratio", 1.0)
    names = ("cat", "dog", "person", "cat,dog")
    alone = {
        (seed, each): ask(client, png(seed), names=each).json()["detections"] for seed in range(2) for each in names
    }
    images, batches = service.batcher.images, service.batcher.batches
    with ThreadPoolExecutor(8) as pool:
        together = dict(
            zip(alone, pool.map(lambda key: ask(client, png(key[0]), names=key[1]).json()["detections"], alone))
        )
    for key, expected in alone.items():
        assert [found["name"] for found in together[key]] == [found["name"] for found in expected]
        np.testing.assert_allclose(
            [found["score"] for found in together[key]], [found["score"] for found in expected], atol=2e-4
        )
    assert service.batcher.images - images == 8 and service.batcher.batches - batches < 8


def test_labels_are_kept_by_an_identifier(client):
    kept = client.post("/labels", json={"names": ["salt, pepper", "cat"]}).json()
    assert kept["names"] == ["salt, pepper", "cat"] and kept["checkpoint"]["name"] == "tiny"
    first = ask(client, png(1), labels=kept["labels"]).json()
    assert first["phrases"] == ["salt, pepper", "cat"]
    assert first["detections"] == ask(client, png(1), names='"salt, pepper",cat').json()["detections"] != []
    refused(ask(client, png(1), labels="0123"), 404, "labels '0123' are not known, or not any more")


def bomb():
    """The header of a PNG of 200 megapixels."""
    data = bytearray(png())
    data[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def npy_header(shape, descr="|u1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (b"no image at all", 415, r"^image 1 of 1 \(a.png\) is no image that can be read \(15 bytes\): a text, 'no image at all'$"),
        (b"", 415, "the file is empty"),
        (png()[:-40], 422, "end before the image does|are damaged"),
        (bomb(), 413, "is huge, at most 80,000,000 pixels are read: make it smaller"),
        (png(0, 1000, 2), 422, "has 2 x 1000 pixels: too long and narrow for this model"),
        (npy(np.zeros((4, 4), np.uint8)), 422, r"is an array uint8\[4, 4\]: expected uint8\[H W 3\]"),
        (npy(np.array([print], object)), 422, "is an array object|is no array that can be read"),
        (npy_header((4000, 5000, 3)), 422, "with 0 bytes of values: it is cut"),
        (npy_header((10**6, 10**6, 3)), 413, "is huge: 1000000 x 1000000 pixels"),
        (b"\x93NUMPY\x01\x00\xff\xff{'", 422, "its .npy header is damaged"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(client, data, status, text):
    refused(ask(client, data, names="cat"), status, text)


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({}, 422, "expected one of names, text and labels, found none of them"),
        ({"text": "   "}, 422, "found none of them, or empty ones"),
        ({"names": "cat", "text": "dog"}, 422, "found names and text"),
        ({"names": ",".join(f"thing {number}" for number in range(10_000))}, 422, "10000 names: expected at most 8"),
        ({"names": "cat," * 60_000}, 422, "names have 240000 characters: expected at most 200000"),
        ({"text": "cat . " * 5000}, 422, "text has 30000 characters"),
        ({"names": "\u732b,\u72ac"}, 422, "^names: .*vocabulary"),
        ({"names": "cat,,dog"}, 422, "names: name 2 of 3 is empty"),
        ({"names": "cat,CAT"}, 422, "the same"),
        ({"names": '"cat'}, 422, "double quotes stand around a whole name: '\"salt, pepper\",cup'$"),
        ({"text": "it is so"}, 422, "no noun phrase found in it .* or give names$"),
        ({"text": "a cat . " * 12}, 422, "^text"),
        ({"names": "cat\u0000"}, 422, "U\\+0000"),
        ({"names": "cat", "threshold": "1"}, 422, "^threshold: Input should be less than 1"),
        ({"names": "cat", "threshold": "nan"}, 422, "^threshold"),
        ({"names": "cat", "threshold": "low"}, 422, "^threshold: Input should be a valid number"),
    ],
)  # fmt: skip
def test_what_is_no_query_is_refused(client, fields, status, text):
    refused(ask(client, png(), **fields), status, text)


def test_too_much_is_refused_and_what_is_no_form(client):
    refused(ask(client, *[png()] * 4, names="cat"), 413, "4 images: expected at most 3")
    refused(ask(client, b"0" * 1_100_000, names="cat"), 413, r"the body has 110\d+ bytes: expected at most 1,000,000")
    chunks = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' * (not number) + b"0" * 100_000
        for number in range(30)
    )
    refused(
        client.post("/detect", content=chunks, headers={"content-type": "multipart/form-data; boundary=x"}),
        413,
        "more than 1,000,000 bytes",
    )
    refused(client.post("/detect", json={"names": "cat"}), 422, "^image: Field required$")
    refused(client.post("/detect", content=b"--y", headers={"content-type": "multipart/form-data"}), 400, "boundary")
    refused(
        client.post("/labels", content=b"[" * 100_000, headers={"content-type": "application/json"}),
        400,
        "parsing the body",
    )
    refused(client.get("/detect"), 405, "Method Not Allowed")
    values = b'{"names": [' + b"0," * 300_000 + b"0]}"
    refused(
        client.post("/labels", content=values, headers={"content-type": "application/json"}),
        413,
        "the body has more than 200,000 values",
    )


def test_no_file_beside_those_of_the_page_is_served(server):
    host, port = server.address.removeprefix("http://").split(":")
    for path in (
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "..%5capp.py",
        "/etc/hostname",
        "%2fetc%2fhostname",
        "%00",
        "examples",
    ):
        connection = http.client.HTTPConnection(host, int(port), timeout=20)  # httpx would make the path plain
        connection.request("GET", f"/page/{path}")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (404, b'{"error":"Not Found"}'), path
        connection.close()


def test_a_page_of_another_site_cannot_use_the_server(client, server):
    """Neither under a name of its own, whose answers it could read, nor under the server's, as a form that asks without reading."""
    refused(
        client.get("/health", headers={"host": "attacker.example"}),
        400,
        "the Host 'attacker.example' is not this server's",
    )
    form = {"files": {"image": png()}, "data": {"names": "cat"}}
    for origin in ("http://attacker.example", "null", "http://127.0.0.1:1", "http://127.0.0.1", server.address.replace("http:", "https:"),
                   server.address + ".attacker.example"):  # fmt: skip
        answer = client.post("/detect", headers={"origin": origin}, **form)
        refused(
            answer,
            403,
            f"a page of '{re.escape(origin)[:20]}.* may not ask this server: expected the Origin {server.address}, or none",
        )
        assert (
            answer.headers["cross-origin-resource-policy"] == "same-origin"
            and "access-control-allow-origin" not in answer.headers
        )
    assert client.post("/detect", headers={"origin": server.address}, **form).status_code == 200
    refused(
        client.options(
            "/detect", headers={"origin": "http://attacker.example", "access-control-request-method": "POST"}
        ),
        403,
        "may not ask",
    )


def test_a_body_that_never_ends_and_a_client_that_leaves(client, server, service):
    host, port = server.address.removeprefix("http://").split(":")
    head = b"POST /detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 500000\r\n\r\n--x\r\n"
    with socket.create_connection((host, int(port))) as slow, socket.create_connection((host, int(port))) as gone:
        gone.sendall(head)
        slow.sendall(head)
        gone.close()
        slow.settimeout(20)
        answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not end within 2 s" in answer
    assert ask(client, png(), names="cat").status_code == 200


class Slow:
    """A detector that takes its time, of the tiny one."""

    def __init__(self, detector, seconds):
        self.detector, self.seconds, self.asked = detector, seconds, 0

    def __getattr__(self, name):
        return getattr(self.detector, name)

    def queries_async(self, images, queries):
        self.asked += len(images)
        finish = self.detector.queries_async(images, queries)

        def late():
            time.sleep(self.seconds)
            return finish()

        return late


@pytest.fixture
def slow(service, monkeypatch):
    """Both detectors take 0.8 s longer."""
    single, detector = Slow(service.batcher.single, 0.8), Slow(service.batcher.detector, 0.8)
    monkeypatch.setattr(service.batcher, "single", single)
    monkeypatch.setattr(service.batcher, "detector", detector)
    return single, detector


def test_a_full_queue_a_late_answer_and_a_client_that_goes_away(client, server, service, slow, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, png(), png(), png(), names="cat"), range(8)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[:4] == [200] * 4 and statuses[-1] == 429, statuses
    refused(
        next(answer for answer in answers if answer.status_code == 429),
        429,
        "the queue is full: 12 of 12 images wait, 3 more do not fit",
    )
    assert next(answer for answer in answers if answer.status_code == 429).headers["retry-after"] == "1"
    assert service.batcher.waiting == 0
    # Those who have gone are not computed.
    before = sum(each.asked for each in slow)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, client, png(), names="cat")
        time.sleep(0.3)

        def leave(_):
            with httpx.Client(base_url=server.address) as other, pytest.raises(httpx.ReadTimeout):
                other.post("/detect", files=[("image", png())] * 3, data={"names": "dog"}, timeout=0.1)

        list(pool.map(leave, range(3)))
        assert first.result().status_code == 200
    deadline = time.monotonic() + 10
    while service.batcher.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.batcher.waiting == 0 and sum(each.asked for each in slow) - before < 10
    assert ask(client, png(), names="cat").status_code == 200
    monkeypatch.setattr(service, "limits", dataclasses.replace(LIMITS, seconds=0.2))
    late = Running(service_without_thread(service))
    try:
        with httpx.Client(base_url=late.address, timeout=30) as other:
            refused(ask(other, png(), names="cat"), 504, "no answer within 0.2 s")
    finally:
        late.stop()


def service_without_thread(service):
    """The service, whose thread the fixture `server` starts and stops."""
    copy = object.__new__(Service)
    copy.__dict__ |= vars(service) | {"start": lambda: None, "stop": lambda: None}
    return copy


def test_a_fault_of_the_detector_is_500_for_its_batch_alone(client, service, monkeypatch, caplog):
    # Which of the two answers goes by their times, measured at the start.
    for detector in (service.batcher.single, service.batcher.detector):
        monkeypatch.setattr(detector, "queries_async", lambda *_: 1 / 0)
    refused(ask(client, png(), names="cat"), 500, "a fault of the server, whose log has the traceback")
    assert "ZeroDivisionError" in caplog.text and "POST '/detect'" in caplog.text
    monkeypatch.undo()
    assert ask(client, png(), names="cat").status_code == 200


def test_a_token_is_asked_for(server, service):
    guarded = Running(service_without_thread(service), token="a-long-enough-token")
    try:
        with httpx.Client(base_url=guarded.address, timeout=60) as client:
            for header in (
                {},
                {"Authorization": "Bearer other"},
                {"Authorization": "Basic !"},
                {"Authorization": "Bearer"},
            ):
                client.headers = header
                refused(ask(client, png(), names="cat"), 401, "expected the header Authorization: Bearer TOKEN")
            assert (
                client.get("/health").status_code
                == client.get("/").status_code
                == client.get("/page/page.js").status_code
                == 200
            )
            for header in (
                "Bearer a-long-enough-token",
                "Basic " + base64.b64encode(b"user:a-long-enough-token").decode(),
            ):
                client.headers = {"Authorization": header}
                assert ask(client, png(), names="cat").status_code == 200
    finally:
        guarded.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A working folder with a checkpoint of the tiny network."""
    workdir = str(tmp_path_factory.mktemp("run"))
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(3, Saved(PARAMS, {"count": np.zeros(1)}, {}), CONFIG)
    write_config(workdir, CONFIG)
    return workdir


def test_a_job_that_cannot_start_says_why_in_a_line(run, tmp_path, capsys):
    short = tmp_path / "token"
    short.write_text("short\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, line in (
            ((f"--checkpoint={run}", f"--port={port}"), f"--port={port} of 127.0.0.1 is in use: give another --port, or --port=0 for a free one"),
            ((f"--checkpoint={tmp_path}", "--port=0"), f"{tmp_path}/checkpoints holds no complete checkpoint: expected a --workdir that `train` wrote"),
            (("--port=0",), "no checkpoint: expected --checkpoint=WORKDIR"),
            (("--host=0.0.0.0",), "--host=0.0.0.0 lets other machines ask: give --token-file=FILE"),
            (("--host=no.such.host.invalid", f"--token-file={tmp_path / 'none'}"), f"--token-file={tmp_path / 'none'} cannot be read"),
            ((f"--token-file={short}",), f"--token-file={short}: its first line has 5 characters: expected a token of at least 16"),
            (("--label-studio-files=/no/such",), "--label-studio-files=/no/such is no local folder"),
            (("--host=256.0.0.1.1", f"--token-file={tmp_path / 'long'}"), "--host=256.0.0.1.1 is no address of this machine"),
        ):  # fmt: skip
            (tmp_path / "long").write_text("a-long-enough-token\n")
            assert run_job("serve", flags) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"serve: {line}") and error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.processes
def test_sigterm_answers_what_runs_and_leaves(run, tmp_path):
    environment = os.environ | {"XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])}
    with (tmp_path / "log").open("w+") as log:
        command = [sys.executable, "-m", "glip_jax", "serve", f"--checkpoint={run}", "--port=0", "--max-names=100"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            deadline = time.monotonic() + 120
            while not (found := re.search(r"listening at (http\S+)/ without", (tmp_path / "log").read_text())):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            with httpx.Client(base_url=found[1], timeout=60) as client, ThreadPoolExecutor(8) as pool:
                assert ask(client, png(), names="cat").status_code == 200
                names = ",".join(f"thing {number}" for number in range(60))
                asked = [pool.submit(ask, client, *[png(number)] * 8, names=names) for number in range(6)]
                while client.get("/health").json()["waiting"] < 20:
                    assert not all(each.done() for each in asked)
                process.send_signal(signal.SIGTERM)
                answers = [each.result() for each in asked]
            assert [answer.status_code for answer in answers] == [200] * 6 and len(answers[0].json()) == 8
            assert process.wait(60) == 0
        finally:
            process.kill()
    output = (tmp_path / "log").read_text()
    assert "compiled, or read from the cache" in output and output.splitlines()[-1].startswith(
        "stopped: 49 images answered in"
    )


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_calls_of_the_guide_run(server, service, tmp_path):
    """Those of docs/guides/serving.md and docs/tools/label-studio.md, against servers of the tiny network."""
    guide = "\n".join((ROOT / "docs" / page).read_text() for page in ("guides/serving.md", "tools/label-studio.md"))
    calls = [
        line
        for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("curl")
    ]
    assert len(calls) == 8
    (tmp_path / "upload" / "1").mkdir(parents=True)
    for name in ("scene.jpg", "other.jpg", "upload/1/scene.jpg"):
        Image.fromarray(pixels(1)).save(tmp_path / name)
    (tmp_path / "token").write_text("a-long-enough-token\n")
    plain = Running(service_without_thread(service), hosts=("127.0.0.1",), files=str(tmp_path))
    guarded = Running(service_without_thread(service), token="a-long-enough-token")
    try:
        answers = []
        for call in calls:
            address = guarded.address if "token" in call else plain.address
            command = call.replace("curl ", "curl --silent --show-error --fail-with-body ", 1).replace(
                "http://127.0.0.1:8000", address
            )
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (call, done.stdout, done.stderr)
            answers.append(json.loads(done.stdout))
    finally:
        plain.stop()
        guarded.stop()
    assert answers[0]["phrases"] == ["owl", "grapes", "snail"] and answers[1]["phrases"] == [
        "an owl",
        "grapes",
    ]
    assert answers[1]["threshold"] == 0.2 and len(answers[2]) == 2 and answers[3]["names"] == ["owl", "grapes", "snail"]
    assert answers[4]["status"] == "UP" and {"/detect", "/labels", "/predict", "/setup"} <= set(answers[5]["paths"])
    assert answers[6]["phrases"] == ["owl"] and len(answers[7]["results"]) == 1
    # The example of an answer has the fields of one.
    (example,) = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    shown = json.loads(example)
    assert (
        set(shown) == set(answers[0])
        and set(shown["checkpoint"]) == set(answers[0]["checkpoint"])
        and set(shown["versions"]) < set(answers[0]["versions"])
    )
