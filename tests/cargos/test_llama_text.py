"""What text a token releases: stop strings and characters across token borders."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.runtimes.llama.text import Detokenizer


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, read character by character: the stop string that is complete first ends the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(len(stop) for stop in complete)], True
    return text, False


def released(pieces: list[bytes], stops: list[str]) -> tuple[list[str], str, bool]:
    detokenizer = Detokenizer(stops)
    texts = [detokenizer.push(piece) for piece in pieces]
    return texts, detokenizer.finish(), detokenizer.stopped


@st.composite
def outputs(draw: st.DrawFn) -> tuple[bytes, list[bytes], list[str]]:
    alphabet = st.sampled_from(["a", "b", "ä", "€", "😀", "\n", "<", "|"])
    data = "".join(draw(st.lists(alphabet, max_size=24))).encode()
    if draw(st.booleans()):  # models do make invalid bytes
        data += draw(st.binary(max_size=6))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    borders = [0, *cuts, len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(borders)]
    stops = ["".join(s) for s in draw(st.lists(st.lists(alphabet, min_size=1, max_size=4), max_size=3))]
    return data, pieces, stops


@given(outputs())
def test_released_text_is_the_decoded_text_up_to_the_first_stop(case: tuple[bytes, list[bytes], list[str]]):
    data, pieces, stops = case
    texts, tail, stopped = released(pieces, stops)
    expected, found = cut_at_first_stop(data.decode("utf-8", "replace"), stops)
    assert "".join(texts) + tail == expected
    assert stopped == found


@given(outputs(), st.integers(0, 12))
def test_text_of_a_token_depends_only_on_the_tokens_before(
    case: tuple[bytes, list[bytes], list[str]], place: int
):
    _, pieces, stops = case
    whole, _, _ = released(pieces, stops)
    part, _, _ = released(pieces[:place], stops)
    assert part == whole[:place]


@given(st.text(max_size=20))
def test_no_partial_character_is_released(text: str):
    detokenizer = Detokenizer()
    for byte in text.encode("utf-8", "surrogatepass"):
        out = detokenizer.push(bytes([byte]))
        assert "\N{REPLACEMENT CHARACTER}" not in out or "\N{REPLACEMENT CHARACTER}" in text


def test_a_possible_stop_is_held_back_and_comes_out_when_it_is_none():
    detokenizer = Detokenizer(["STOP"])
    assert detokenizer.push(b"abST") == "ab"
    assert detokenizer.push(b"O") == ""
    assert detokenizer.push(b"x") == "STOx"


def test_the_stop_that_is_complete_first_wins_whatever_the_split():
    for pieces in ([b"abc"], [b"ab", b"c"], [b"a", b"b", b"c"]):
        texts, tail, stopped = released(pieces, ["abc", "b"])
        assert ("".join(texts) + tail, stopped) == ("a", True)


def test_nothing_comes_after_the_stop():
    detokenizer = Detokenizer(["."])
    assert detokenizer.push(b"One. Two") == "One"
    assert detokenizer.stopped
    assert detokenizer.push(b" three") == ""
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("tail", [b"\xe2\x82", b"\xf0\x9f\x98"])
def test_half_a_character_at_the_end_is_replaced(tail: bytes):
    detokenizer = Detokenizer()
    assert detokenizer.push(b"ok" + tail) == "ok"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
