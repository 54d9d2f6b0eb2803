"""Work for several processes that costs no training: python -m tests.distributed.joined WORK FLAGS, ended as a job is.

steps         a thousand steps, each process at a speed of its own, until a signal stops all
evaluation    three steps, then an evaluation in which process 0 never ends its share
waiting       process 0 sleeps, the others wait for it in a collective
one_fails     process 1 has bad input, the others wait for it in a collective
all_fail      all have the same bad input
"""

import signal
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
from jax.experimental import multihost_utils

from glip_jax.cli import errors, log
from glip_jax.cli.command_line import flags
from glip_jax.cli.processes import ProcessArguments, run_joined
from glip_jax.config import Config, ConfigError
from glip_jax.distributed import exit_codes
from glip_jax.evaluation.shares import Share
from glip_jax.training.monitoring.evaluations import Evaluations
from glip_jax.training.monitoring.signals import StopSignals
from tests import tiny_run


def _stop(where, number):
    print(f"stopped {where} {signal.Signals(number).name}", flush=True)
    raise SystemExit(exit_codes.CANCELLED if number == signal.SIGINT else exit_codes.PREEMPTED)


def _steps(cluster, signals, count):
    for step in range(1, count + 1):
        time.sleep(0.01 * (1 + jax.process_index()))
        if cluster.agreed():
            _stop(f"after step {step}", cluster.met(signals.number))


def steps(cluster):
    with StopSignals(cluster.asked) as signals:
        print("ready", flush=True)
        _steps(cluster, signals, 1000)


def evaluation(cluster):
    def evaluate(params, step, meet):
        share = Share(jax.process_index(), jax.process_count(), meet)
        assert share.gather(share.index) == list(range(share.count))
        print("ready", flush=True)
        while share.first:
            time.sleep(0.05)
        share.gather(0)
        raise AssertionError("not left")

    with StopSignals(cluster.asked) as signals:
        _steps(cluster, signals, 3)
        config = tiny_run.replace(Config(), "evaluation", parameters="raw")
        evaluations = Evaluations(config, "", evaluate, None, print, cluster, signals)
        state = SimpleNamespace(params=np.ones(()), ema=np.ones(()))
        assert evaluations.make(3, state)[2]  # pyright: ignore[reportArgumentType]
        _stop("in the evaluation", cluster.met(signals.number))


def waiting(cluster):
    print("ready", flush=True)
    if jax.process_index() == 0:
        time.sleep(1000)
    multihost_utils.process_allgather(np.int32(0))


def one_fails(cluster):
    if jax.process_index() == 1:
        raise ConfigError("a file is missing here")
    multihost_utils.process_allgather(np.int32(0))


def all_fail(cluster):
    time.sleep(jax.process_index())
    raise ConfigError("a file is missing everywhere")


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has all that it starts ignore
    log.install()
    work = globals()[sys.argv[1]]
    arguments = flags(sys.argv[2:], ProcessArguments, "train", "")
    try:
        sys.exit(run_joined("train", arguments, dict, work, saves=True) or 0)
    except Exception as error:
        sys.exit(errors.report("train", error))
