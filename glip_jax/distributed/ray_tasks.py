"""Tasks on a Ray cluster: workers that are made once on a machine and do one task after the other.

Ray places the workers and starts them again where one dies or its machine is lost. The tasks are kept here: one whose worker died goes
to the next worker that is free, and three deaths at the same task end the job. An error that a task raises ends the job at once.

This is the only module that imports ray.
"""

import contextlib
import importlib.util
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glip_jax import UserError
from glip_jax.distributed import exit_codes

__all__ = ["RayError", "Run", "WorkerLostError", "check_cluster", "ray_workers"]

logger = logging.getLogger(__name__)

_DEATHS = 3
"""Workers that may die at one task."""

_NOTICE_SECONDS = 60.0
"""Between two lines that say that no worker is there."""

_PATIENCE_SECONDS = 1800.0
"""Time without any worker after which the job ends."""

_CONNECT_SECONDS = 10.0
_WANTED = "expected auto or HOST:PORT of a running cluster (`ray start --head` prints it, `ray status` shows it)"


class RayError(UserError, RuntimeError):
    """There is no Ray, no cluster, or nothing on it that could work."""


class WorkerLostError(UserError, RuntimeError):
    """Workers died again and again; what is done is kept, and the same command continues."""

    exit_code = exit_codes.PEER_LOST


Run = Callable[[Sequence[str], Callable[[str], Any]], Iterator[str]]
"""Does tasks, given by name: a worker gets what the second argument makes of the name. Yields the names as the tasks are done, in any order."""


@contextlib.contextmanager
def ray_workers(
    address: str, make: Callable[[], Callable[[Any], Any]], *,
    count: int = 0, most: int = 1_000_000, resources: Mapping[str, float] | None = None, by_core: bool = False,
) -> Iterator[Run]:  # fmt: skip
    """Workers on the cluster at `address`, and the function that has them do tasks; they end with the context.

    `make`, which is pickled, makes on each worker the function that does a task. `count` 0: as many as the machines offer now, at most
    `most`; `resources` of one worker, such as {"TPU": 1}; empty: one TPU or GPU where a machine has any, else a core (`by_core`) or a
    machine.

    Raises RayError without ray, cluster, or resources; the function raises WorkerLostError after three deaths at one task, and what a task
    raises.
    """
    address = check_cluster(address)
    import ray

    _connect(ray, address)
    try:
        nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        wanted = _workers(nodes, count, dict(resources or {}), by_core)[:most]
        counts = ", ".join(f"{n} with {what}" for what, n in Counter(map(_words, wanted)).items())
        logger.info(f"Ray at {address}: {len(nodes)} machines; workers: {counts}")
        actors = [_start(ray, each, make) for each in wanted]
        yield lambda names, payload: _work(ray, actors, names, payload)
    finally:
        ray.shutdown()  # ends the workers too


def check_cluster(address: str) -> str:
    """The address, or that in RAY_ADDRESS for auto; RayError without ray, or where nothing answers."""
    if importlib.util.find_spec("ray") is None:
        raise RayError("--ray needs ray, which is not installed: pip install -r requirements-ray.txt")
    found = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    if found != "auto":
        host, _, port = found.rpartition(":")
        if not host or not port.isdecimal():
            raise RayError(f"--ray={found}: {_WANTED}")
        try:  # ray itself waits for many minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise RayError(f"--ray={found}: no cluster answers there ({error}); {_WANTED}") from None
    return found


def _connect(ray: Any, address: str) -> None:
    """Joins the cluster; RayError if there is none."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RayError(f"--ray={address}: the cluster cannot be joined ({reason}); {_WANTED}") from None
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, handler)  # ray has set its own, with another exit code


def _workers(
    nodes: Sequence[Mapping[str, float]], count: int, resources: dict[str, float], by_core: bool
) -> list[dict[str, float]]:
    """What each worker reserves; RayError if no machine offers it."""
    if not resources:
        # A machine without accelerators, such as the head, does not help one that has them.
        kind = next((name for name in ("TPU", "GPU") if any(node.get(name, 0) >= 1 for node in nodes)), "")
        if kind and not by_core:
            resources = {kind: 1}
        elif by_core or count:
            resources = {"CPU": 1}
        else:
            found = [{"CPU": node["CPU"]} for node in nodes if node.get("CPU", 0) > 0]
            if found:
                return found
            resources = {"CPU": 1}
    room = sum(min(int(node.get(name, 0) / each) for name, each in resources.items()) for node in nodes)
    if not count and not room:
        offered = "; ".join(_words(node) for node in nodes)
        raise RayError(
            f"no machine of the cluster offers {_words(resources)} (they offer {offered}): give other --ray-resources, or --ray-workers=N if "
            "the cluster starts machines by itself"
        )
    return [resources] * (count or room)


def _words(resources: Mapping[str, float]) -> str:
    shown = {
        name: n for name, n in resources.items() if not name.startswith(("node:", "accelerator_type:", "object_store"))
    }
    return ", ".join(f"{name} {n:g}" for name, n in sorted(shown.items()) if name != "memory" or len(shown) == 1)


def _start(ray: Any, resources: Mapping[str, float], make: Callable[[], Callable[[Any], Any]]) -> Any:
    made, path = ray.cloudpickle.dumps(make), str(Path(__file__).resolve().parents[2])

    class Worker:
        """The actor. Ray sends it as it stands here, so that it can say that this package is not where it works."""

        do_task = None

        def ready(self) -> None:
            """Answers once the worker is placed, or has been started again."""

        def do(self, task: Any) -> None:
            """Does a task; the first call makes what does it."""
            if self.do_task is None:
                sys.path.append(path)  # where all machines see the folder of a checkout
                self.do_task = pickle.loads(made)()
            self.do_task(task)

    others = {name: each for name, each in resources.items() if name not in ("CPU", "GPU", "memory")}
    # A call in flight is not repeated by Ray, which would send it to the same worker, perhaps one without a machine.
    actor = ray.remote(
        num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), memory=resources.get("memory"), resources=others,
        max_restarts=-1, max_task_retries=0,
    )(Worker)  # fmt: skip
    return actor.remote()


def _work(ray: Any, actors: Sequence[Any], names: Sequence[str], payload: Callable[[str], Any]) -> Iterator[str]:
    todo, deaths, idle = deque(names), Counter[str](), list[Any]()
    running: dict[
        Any, tuple[Any, str]
    ] = {}  # a call: its worker and task, "" for the question whether the worker is there
    since = time.monotonic()

    def ask(actor: Any) -> None:
        running[actor.ready.options(max_task_retries=-1).remote()] = (actor, "")

    for actor in actors:
        ask(actor)
    while todo or any(name for _, name in running.values()):
        while todo and idle:
            actor, name = idle.pop(), todo.popleft()
            running[actor.do.remote(payload(name))] = (actor, name)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=_NOTICE_SECONDS)
        if not finished:
            if any(name for _, name in running.values()):
                since = time.monotonic()
            else:
                _say_waiting(time.monotonic() - since)
            continue
        since = time.monotonic()
        actor, name = running.pop(finished[0])
        try:
            ray.get(finished[0])
        except ray.exceptions.RayTaskError as error:  # of the task
            cause = error.cause
            if isinstance(cause, ModuleNotFoundError):
                raise RayError(
                    f"a machine of the cluster cannot import {cause.name}: install the same glip_jax and its requirements on all of them"
                ) from error
            raise cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.OutOfMemoryError) as error:
            _count_death(name, deaths, error)
            if name:
                todo.appendleft(name)
            ask(actor)
            continue
        idle.append(actor)
        if name:
            yield name


def _count_death(name: str, deaths: Counter[str], error: Exception) -> None:
    """Says that a worker died; WorkerLostError if it happens too often."""
    deaths[name] += 1
    reason = " ".join(str(error).split())[:300]
    if deaths[name] >= _DEATHS:
        raise WorkerLostError(
            f"{deaths[name]} workers died at {name or 'their start'} (killed, or out of memory: reserve more of a machine with --ray-resources; last: "
            f"{reason}); what is done is kept, the same command continues"
        )
    logger.warning(
        f"{name or 'a worker'}: its worker died ({reason}); another one does it, time {deaths[name] + 1} of {_DEATHS}"
    )


def _say_waiting(seconds: float) -> None:
    if seconds > _PATIENCE_SECONDS:
        raise WorkerLostError(
            f"no machine of the cluster had room for a worker for {seconds / 60:.0f} minutes (`ray status` shows what is missing); what is "
            "done is kept, the same command continues"
        )
    logger.warning(
        f"no worker has a place for {seconds:.0f} s: waiting for a machine (`ray status` shows what is missing)"
    )
