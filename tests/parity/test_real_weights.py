"""MiniLM as it was trained, beside transformers' BertModel; the rest of real_weights wants photographs."""

import pytest

from tests.parity import real_weights

pytestmark = pytest.mark.compiles


def test_minilm_computes_what_transformers_computes() -> None:
    difference, largest = real_weights.hidden_states_differ(real_weights.CAPTIONS)
    assert difference < 2e-5 and largest > 1
