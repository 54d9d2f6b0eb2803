"""The first SIGTERM or Ctrl-C is collected, an evaluation is left, and the second acts as usual."""

import os
import signal
import time

import pytest

from glip_jax.training.monitoring import signals
from glip_jax.training.monitoring.signals import EvaluationLeft, StopSignals


def test_the_first_signal_is_collected_and_a_later_one_acts_as_usual(monkeypatch):
    with StopSignals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, which a launcher has sent again
        assert received.number == signal.SIGINT
        monkeypatch.setattr(signals, "_REPEATED_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        with StopSignals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received.number == signal.SIGHUP
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) == signal.SIG_DFL
        with StopSignals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _signal(how):
    assert how != "before"
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("not left")


@pytest.mark.parametrize("how", ["within", "before"])
def test_a_signal_leaves_an_evaluation(how):
    with StopSignals() as received:
        if how == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(EvaluationLeft), received.leaving():
            _signal(how)
        assert received.number == signal.SIGTERM


def test_of_several_processes_any_signal_is_passed_on_as_sigterm_and_one_to_another_leaves_an_evaluation(monkeypatch):
    """Ctrl-C alone ends nothing here: all leave together."""
    monkeypatch.setattr(signals, "_LOOK_SECONDS", 0.05)
    noticed, came = [], []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))  # as jax's preemption service has one
    alarm = signal.getsignal(signal.SIGALRM)

    def notice(received):
        with received.held():
            noticed.append(True)
            time.sleep(0.2)
            noticed.clear()
        came.append("the end of what is held")
        noticed.append(True)
        time.sleep(10)
        raise AssertionError("not left")

    try:
        with StopSignals(lambda: bool(noticed)) as received:
            with received.leaving():
                os.kill(os.getpid(), signal.SIGINT)
                assert received.number == signal.SIGINT and came == [signal.SIGTERM]
                time.sleep(0.2)
            with pytest.raises(EvaluationLeft), received.leaving():
                notice(received)
            assert came[-1] == "the end of what is held"
            with pytest.raises(EvaluationLeft), received.leaving():
                raise AssertionError("not left")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGALRM) == alarm and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_waits_for_the_end_of_what_all_processes_do_together():
    done = []

    def together(received):
        with received.held():
            signal.raise_signal(signal.SIGTERM)
            done.append(received.number)
        done.append("the evaluation goes on")

    with StopSignals() as received, received.leaving(), pytest.raises(EvaluationLeft):
        together(received)
    assert done == [signal.SIGTERM]
