"""What the server (`serve`) answers under load: requests per second and waiting times by the number of clients, and a thousand mixed requests.

    python -m benchmarks.serve --checkpoint=runs/demo --images=runs/demo/scenes/validation/images --names="owl,grapes,snail"

Two servers run on the same cores: `batched` as it is, and `one` with --batch-size=1, which computes each image alone. Rounds alternate between them.
A client sends the next request when it has the answer; each row is of `--requests` requests. The mixed requests are good ones, files that are no
images, images of 200 megapixels, empty and too many names, unknown paths, bodies that stop in the middle, and clients that leave; none may be
answered with 500 or more, and the memory after them is compared with that after the first hundred.
"""

import argparse
import contextlib
import io
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

__all__ = ["huge_png", "main"]

_SIDES = {"batched": (), "one": ("--batch-size=1",)}


def huge_png() -> bytes:
    """A PNG whose header says 20,000 x 10,000 pixels, with the data of 8 x 8."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


class _Server:
    """A server in a process of its own."""

    def __init__(self, flags: Sequence[str]) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glip_jax", "serve", "--port=0", *flags], stdout=self._log, stderr=subprocess.STDOUT
        )
        while not (found := re.search(r"listening at (http\S+)/ with", Path(self._log.name).read_text())):
            if self._process.poll() is not None:
                raise SystemExit(Path(self._log.name).read_text())
            time.sleep(0.2)
        self.address = found[1]
        self.ratio = (re.findall(r"a batch of .*", Path(self._log.name).read_text()) or [""])[0]

    def megabytes(self) -> float:
        """Resident memory."""
        line = next(
            line
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        return int(line.split()[1]) / 1024

    def stop(self) -> int:
        """Ends it with SIGTERM; its exit code."""
        self._process.terminate()
        return self._process.wait(120)


def _load(
    server: _Server, clients: int, requests: int, images: Sequence[bytes], names: str
) -> tuple[float, list[float]]:
    """Requests per second, and the seconds of each request."""

    def work(share: int) -> list[float]:
        taken = []
        with httpx.Client(base_url=server.address, timeout=600) as client:
            for number in range(share, requests, clients):
                begin = time.monotonic()
                answer = client.post("/detect", files={"image": images[number % len(images)]}, data={"names": names})
                answer.raise_for_status()
                taken.append(time.monotonic() - begin)
        return taken

    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        taken = [each for part in pool.map(work, range(clients)) for each in part]
    return requests / (time.monotonic() - begin), taken


def _mixed(server: _Server, requests: int, images: Sequence[bytes], names: str) -> tuple[Counter[str], float, float]:
    """How often each status came, and megabytes after the first hundred and at the end."""
    host, port = server.address.removeprefix("http://").split(":")
    bomb = huge_png()
    chooser = random.Random(0)

    def one(client: httpx.Client, number: int) -> str:
        image = images[number % len(images)]
        match chooser.randrange(10):
            case 0 | 1 | 2:
                return str(client.post("/detect", files={"image": image}, data={"names": names}).status_code)
            case 3:
                return str(
                    client.post(
                        "/detect", files=[("image", image)] * 3, data={"text": "a red apple . two cups"}
                    ).status_code
                )
            case 4:
                return str(
                    client.post("/detect", files={"image": b"no image " * 100}, data={"names": names}).status_code
                )
            case 5:
                return str(client.post("/detect", files={"image": bomb}, data={"names": names}).status_code)
            case 6:
                return str(
                    client.post(
                        "/detect", files={"image": image}, data={"names": ",".join(map(str, range(10_000)))}
                    ).status_code
                )
            case 7:
                return str(
                    client.post("/detect", files={"image": image[: len(image) // 2]}, data={"text": " "}).status_code
                )
            case 8:
                return str(client.get(f"/no/such/path/{number}").status_code)
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(
                f"POST /detect HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 50000\r\n\r\n--x\r\n".encode()
            )
        return "left"

    found: Counter[str] = Counter()
    early = 0.0
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.address, timeout=600) as client:
        for begin in range(0, requests, 100):
            found.update(pool.map(lambda number: one(client, number), range(begin, min(requests, begin + 100))))
            early = early or server.megabytes()
    return found, early, server.megabytes()


@contextlib.contextmanager
def _servers(flags: Sequence[str]) -> Iterator[dict[str, _Server]]:
    servers = {side: _Server([*flags, *own]) for side, own in _SIDES.items()}
    try:
        yield servers
    finally:
        codes = {side: server.stop() for side, server in servers.items()}
        print(f"exit codes after SIGTERM: {codes}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="WORKDIR of a run")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--names", default="owl,grapes,snail", help="names that are asked")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients")
    parser.add_argument("--requests", type=int, default=128, help="requests of a row and round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each row")
    parser.add_argument("--mixed", type=int, default=1000, help="mixed requests")
    arguments = parser.parse_args(argv)
    images = [path.read_bytes() for path in sorted(Path(arguments.images).iterdir())[:32]]
    with _servers([f"--checkpoint={arguments.checkpoint}", "--queue=256"]) as servers:
        print(
            f"{servers['batched'].ratio}\n\n| clients | server | requests/s | p50 ms | p95 ms |\n|---|---|---|---|---|",
            flush=True,
        )
        for clients in arguments.clients:
            rows: dict[str, list[tuple[float, list[float]]]] = {side: [] for side in servers}
            for _ in range(arguments.rounds):
                for side, server in servers.items():
                    rows[side].append(_load(server, clients, arguments.requests, images, arguments.names))
            for side, results in rows.items():
                taken = sorted(1000 * each for _, part in results for each in part)
                rate = statistics.median(rate for rate, _ in results)
                print(
                    f"| {clients} | {side} | {rate:.1f} | {taken[len(taken) // 2]:.0f} | {taken[int(0.95 * len(taken))]:.0f} |",
                    flush=True,
                )
        found, early, late = _mixed(servers["batched"], arguments.mixed, images, arguments.names)
        print(
            f"\nmixed requests by status: {dict(sorted(found.items()))}; memory {early:.0f} MB after the first hundred, {late:.0f} MB at the end",
            flush=True,
        )
        if any(status.startswith("5") for status in found):
            raise SystemExit("a request was answered with 500 or more")


if __name__ == "__main__":
    main()
