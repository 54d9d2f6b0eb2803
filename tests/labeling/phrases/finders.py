"""The two phrase finders for tests; tests of spaCy are skipped where it is not installed."""

import functools

import pytest

from glip_jax.labeling.phrases.finders import phrase_finder


@functools.cache
def finder(name):
    try:
        return phrase_finder(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def phrases(name, caption):
    return [caption[begin:end] for begin, end in finder(name).find(caption).spans]
