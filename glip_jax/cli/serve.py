"""The job `serve`: an HTTP server that detects, with a page to try it.

/           a page: drop an image, type phrases, see boxes
/detect     images and names or a text in, boxes out
/labels     keeps a list of names
/health     whether it can answer, and what it is
/predict    with /setup, /validate and /versions: a Label Studio ML backend
"""

import errno
import ipaddress
import logging
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from etils import epath

from glip_jax import UserError
from glip_jax.cli import checkpoint_argument
from glip_jax.cli.command_line import flags, split_settings
from glip_jax.cli.score_thresholds import score_thresholds
from glip_jax.config import PathStr
from glip_jax.config.ranges import BelowOne, FalseAlarms, Limit, Range
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache

if TYPE_CHECKING:
    from glip_jax.cli.serving.service import Limits, Service

__all__ = ["Serve", "ServeError", "load", "main", "open_socket"]

logger = logging.getLogger(__name__)

_EXAMPLE = "--checkpoint=runs/demo --port=8000"
_LIBRARIES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_CONNECTIONS = 1000
_TOKEN = 16
"""Characters that a token has at least."""


class ServeError(UserError, ValueError):
    """An address, a token or a folder that the server cannot work with, or libraries that are missing."""


@dataclass(frozen=True)
class Serve:
    """Answer over HTTP what is where in images, and show a page to try it at http://HOST:PORT/.

    POST /detect takes `image` (repeatable), and `names` with commas or `text`; docs/guides/serving.md has calls. Every canvas is compiled at the start, so
    the first request is as quick as the others. Requests that come within 20 ms share a batch. Without --host only this machine can connect; any
    other address needs --token-file, whose token clients send as `Authorization: Bearer TOKEN`. It needs `pip install -r requirements-serve.txt`.
    Settings are those the checkpoint was trained with; --config=FILE.py gives others, --config.detection.nms_iou=0.5 changes one.
    SIGTERM and Ctrl-C answer what runs, then end the server.
    """

    checkpoint: PathStr = ""
    """WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta; local or
    gs://."""
    workdir: PathStr = ""
    """The same as --checkpoint=WORKDIR."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port; 0: a free one."""
    token_file: PathStr = ""
    """File with the token that clients must send, at least 16 characters; required for other addresses than loopback."""
    threshold: BelowOne | None = None
    """Lowest score where a request gives none; default: the one of --false-alarms=0.05 if `evaluate` has measured absent names with this
    checkpoint, else 0.3."""
    false_alarms: FalseAlarms | None = None
    """Take the threshold at which the report of `evaluate` has at most this many false alarms per image and absent name."""
    report: PathStr = ""
    """The evaluation.json with the thresholds; default: the one in the folder of the checkpoint."""
    batch_size: Limit = 0
    """Images of a batch on each device; 0: the setting evaluation.batch_size."""
    queue: Annotated[int, Range(1, 10_000, "images")] = 64
    """Images, and requests, at a time; more are answered with 429."""
    max_images: Annotated[int, Range(1, 1000, "images")] = 16
    """Images of a request."""
    max_names: Annotated[int, Range(1, 100_000, "names")] = 1000
    """Names of a request."""
    max_megabytes: Annotated[float, Range(0, 1000, "megabytes", above=True)] = 32
    """Size of a request."""
    body_seconds: Annotated[float, Range(0, 3600, "seconds", above=True)] = 30
    """Time that a client has to send a request."""
    seconds: Annotated[float, Range(0, 3600, "seconds", above=True)] = 60
    """Time until its answer; later ones are answered with 504."""
    label_studio_files: PathStr = ""
    """Local folder below which images of Label Studio's tasks may lie; default: only images that requests carry."""


def main(argv: Sequence[str]) -> int:
    """Runs the job until a signal; raises ServeError and what `open_named` and `settings_of` raise."""
    settings, own = split_settings(argv)
    job = flags(own, Serve, "serve", _EXAMPLE)
    missing = [name for module, name in _LIBRARIES.items() if util.find_spec(module) is None]
    if missing:
        raise ServeError(f"{' and '.join(missing)} not installed here: pip install -r requirements-serve.txt")
    token, files = _token(job.token_file), _folder(job.label_studio_files)
    loopback = _is_loopback(job.host)
    if not loopback and not token:
        raise ServeError(
            f"--host={job.host} lets other machines ask: give --token-file=FILE with a token that they must send, or leave --host out"
        )
    with open_socket(job.host, job.port) as listening, checkpoint_argument.fitting_parameters():
        _serve(
            load(job, settings),
            listening,
            token,
            ("127.0.0.1", "localhost", "::1", job.host) if loopback and not token else (),
            files,
        )
    return exit_codes.DONE


def load(job: Serve, settings: Sequence[str] = ()) -> "Service":
    """The detectors of the checkpoint, compiled."""
    from glip_jax.cli.serving.service import Model, Service, about, serving_config

    checkpoint = checkpoint_argument.open_named(job.checkpoint, job.workdir, job.step)
    config = checkpoint_argument.settings_of(checkpoint, settings, "serve")
    which = config.evaluation.parameters
    least = score_thresholds(job.threshold, job.false_alarms, job.report, checkpoint, config, [], False)
    described = checkpoint_argument.describe(checkpoint)
    # Clients are told no paths of this machine.
    name = described.replace(checkpoint.workdir, epath.Path(checkpoint.workdir).name, 1)
    logger.info(f"{described}, {which} parameters; threshold {least.threshold:.3g}")
    enable_compilation_cache()
    sha256 = checkpoint.fingerprint(which)
    model = Model(name, sha256, round(least.threshold, 4), about(name, checkpoint.step, sha256))
    service = Service(serving_config(config), checkpoint.parameters(which), model, _limits(job), job.batch_size)
    service.compile()
    return service


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address. Raises ServeError for one that is in use or not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ServeError(
            f"--host={host} is no address of this machine: expected such as 127.0.0.1 or 0.0.0.0"
        ) from None
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened at ({error.strerror})"
        raise ServeError(f"--port={port} of {host} {what}: give another --port, or --port=0 for a free one") from None
    return opened


def _serve(service: "Service", listening: socket.socket, token: str, hosts: Sequence[str], files: str) -> None:
    """Answers requests until SIGTERM or Ctrl-C."""
    import uvicorn

    from glip_jax.cli.serving.app import create_app

    limits = service.limits
    config = uvicorn.Config(
        create_app(service, token, hosts, files), log_config=None, access_log=False, server_header=False, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=round(limits.body_seconds + limits.seconds), lifespan="on",
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info(
        f"listening at http://{shown}:{port}/ {'with a token' if token else 'without a token'}; Ctrl-C or SIGTERM ends"
    )
    # uvicorn gives the signal on after it has stopped; a server that was told to end has done what it should.
    before = [(number, signal.signal(number, lambda *_: None)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    logger.info(f"stopped: {service.batcher.images} images answered in {service.batcher.batches} batches")


def _limits(job: Serve) -> "Limits":
    from glip_jax.cli.serving.service import Limits

    return Limits(
        job.max_images, job.max_names, round(job.max_megabytes * 1e6), job.body_seconds, job.seconds, job.queue
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token(file: str) -> str:
    """The first line of the file of the token; "" without a file."""
    if not file:
        return ""
    try:
        token = Path(file).read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(
            f"--token-file={file} cannot be read ({getattr(error, 'strerror', error)}): expected a text file with a token"
        ) from None
    if len(token) < _TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ServeError(
            f"--token-file={file}: its first line has {len(token)} characters: expected a token of at least {_TOKEN} printable ASCII "
            f"characters without spaces, such as {shlex.join(['openssl', 'rand', '-hex', '24'])} prints"
        )
    return token


def _folder(name: str) -> str:
    if name and not Path(name).is_dir():
        raise ServeError(
            f"--label-studio-files={name} is no local folder: expected the one that Label Studio serves files from"
        )
    return name
