# SPDX-License-Identifier: Apache-2.0
"""What the n-gram speculator drafts after what it has seen."""

from hypothesis import given, settings
from hypothesis import strategies as st

from streaminator.speculative.ngram import NGramSpeculator

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=20), max_size=5)


def trained(order: int, *texts: list[int]) -> NGramSpeculator:
    speculator = NGramSpeculator(order)
    for text in texts:
        speculator.observe(text)
    return speculator


def test_the_most_frequent_continuation_is_drafted() -> None:
    speculator = trained(2, [1, 2, 1, 3, 1, 2, 1, 3, 1, 2])
    assert speculator.draft([9, 1], 1) == [2]


def test_ties_go_to_the_newest_continuation() -> None:
    assert trained(2, [1, 2, 1, 3]).draft([1], 1) == [3]
    assert trained(2, [1, 3], [1, 2]).draft([1], 1) == [2]


def test_a_draft_follows_the_text_it_learned() -> None:
    text = list(range(10))
    assert trained(3, text).draft([2, 3], 4) == [4, 5, 6, 7]
    assert trained(3, text).draft([7, 8], 4) == [9], "nothing follows the end"


def test_the_context_is_as_long_as_the_order_says() -> None:
    text = [1, 2, 3, 9, 2, 4, 9, 2, 4]
    assert trained(2, text).draft([1, 2], 1) == [4]
    assert trained(3, text).draft([1, 2], 1) == [3]
    assert trained(4, text).draft([7, 1, 2], 1) == trained(1, text).draft([], 1), "unknown"


def test_an_unknown_context_drafts_the_most_frequent_token_once() -> None:
    speculator = trained(3, [5, 5, 5, 6, 7])
    assert speculator.draft([8, 8], 4) == [5]


def test_the_unigram_fall_back_is_never_put_after_a_draft() -> None:
    speculator = trained(3, [5, 5, 5, 6, 7])
    assert speculator.draft([5, 6], 4) == [7]


def test_order_1_repeats_the_most_frequent_token() -> None:
    assert trained(1, [4, 4, 6]).draft([1, 2, 3], 3) == [4, 4, 4]


def test_nothing_seen_drafts_nothing() -> None:
    for order in (1, 2, 5):
        assert NGramSpeculator(order).draft([1, 2, 3], 4) == []
        assert trained(order, []).draft([1, 2, 3], 4) == []


def test_known_tokens_fewer_than_the_context_are_a_new_context() -> None:
    assert trained(4, [1, 2, 3, 4, 4]).draft([1], 3) == [4]


def test_texts_are_not_joined() -> None:
    assert trained(2, [1, 2], [3, 4, 4]).draft([2], 1) == [4], "3 came after 2 in no text"


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(texts=TEXTS, order=st.integers(1, 4), known=st.lists(st.integers(0, 6), max_size=6))
def test_state_is_a_function_of_the_texts_observed(
    texts: list[list[int]], order: int, known: list[int]
) -> None:
    one, other = trained(order, *texts), NGramSpeculator(order)
    for text in texts:
        other.draft(known, 3)  # drafting teaches nothing
        other.observe(tuple(text))
    assert one.draft(known, 5) == other.draft(known, 5)
    assert one.num_bytes == other.num_bytes


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(texts=TEXTS, order=st.integers(1, 4), num=st.integers(0, 8))
def test_a_draft_is_never_longer_than_asked_and_holds_only_tokens_seen(
    texts: list[list[int]], order: int, num: int
) -> None:
    draft = trained(order, *texts).draft([1, 2, 3], num)
    assert len(draft) <= num
    assert set(draft) <= {token for text in texts for token in text}


def test_memory_grows_with_what_is_new_only() -> None:
    speculator = trained(3, [1, 2, 3, 4])
    num_bytes = speculator.num_bytes
    assert num_bytes > 0
    speculator.observe([1, 2, 3, 4])
    assert speculator.num_bytes == num_bytes
    speculator.observe([4, 3, 2, 1])
    assert speculator.num_bytes > num_bytes
