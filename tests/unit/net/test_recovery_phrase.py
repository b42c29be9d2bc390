from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import BackupError
from potluck.net.recovery_phrase import from_phrase, to_phrase

SEEDS = st.binary(min_size=32, max_size=32)
SEED = bytes(range(32))
#: Of BIP-39's reference implementation (https://github.com/trezor/python-mnemonic/blob/master/vectors.json).
VECTORS = {
    "00": "abandon " * 23 + "art",
    "7f": "legal winner thank year wave sausage worth useful " * 2 + "legal winner thank year wave sausage worth title",
    "80": "letter advice cage absurd amount doctor acoustic avoid " * 2
    + "letter advice cage absurd amount doctor acoustic bless",
    "ff": "zoo " * 23 + "vote",
}


@pytest.mark.parametrize("byte", VECTORS)
def test_phrases_are_those_of_bip_39(byte: str) -> None:
    seed = bytes.fromhex(byte) * 32
    assert " ".join(to_phrase(seed)) == VECTORS[byte]
    assert from_phrase(VECTORS[byte]) == seed


@given(SEEDS)
def test_a_phrase_gives_its_seed_back(seed: bytes) -> None:
    words = to_phrase(seed)
    assert len(words) == 24 and from_phrase(" ".join(words)) == seed


def test_numbers_blanks_and_capitals_do_not_matter() -> None:
    words = to_phrase(SEED)
    assert from_phrase("\n".join(f" {n}. {word.upper()}\t" for n, word in enumerate(words, 1))) == SEED


@settings(max_examples=15)
@given(SEEDS, st.permutations(range(24)))
def test_another_order_is_refused_or_another_key(seed: bytes, order: list[int]) -> None:
    words = to_phrase(seed)
    other = [words[at] for at in order]
    if other != words:
        try:
            assert from_phrase(" ".join(other)) != seed
        except BackupError:
            pass


def test_a_word_that_is_none_is_named_with_the_nearest() -> None:
    words = to_phrase(SEED)
    words[1], words[4] = "amont", "expyre"
    with pytest.raises(BackupError, match=r"word 2, 'amont' \(perhaps .*amount.*; word 5, 'expyre' \(perhaps .*expire"):
        from_phrase(" ".join(words))


def test_the_checksum_picks_among_the_nearest_if_one_word_is_wrong() -> None:
    words = to_phrase(SEED)
    words[2] = "lier"  # as near to live, like and life
    with pytest.raises(BackupError, match=r"word 3, 'lier' \(perhaps liar\)$"):
        from_phrase(" ".join(words))


def test_four_letters_of_a_word_suggest_it_first() -> None:
    with pytest.raises(BackupError, match=r"'aban' \(perhaps abandon or "):
        from_phrase("aban")


def test_many_wrong_words_are_counted_not_listed() -> None:
    with pytest.raises(BackupError, match=r"word 3, 'qqq'; and 21 more$"):
        from_phrase("qqq " * 24)


@pytest.mark.parametrize("count", [0, 12, 23, 25])
def test_another_number_of_words_is_refused(count: int) -> None:
    with pytest.raises(BackupError, match=f"has 24 words, and these are {count}"):
        from_phrase("abandon " * count)


def test_a_word_mistaken_for_one_like_it_is_guessed() -> None:
    words = to_phrase(SEED)
    words[words.index("math")] = "match"
    with pytest.raises(BackupError, match=r"checksum does not fit: perhaps .*'math' instead of 'match'"):
        from_phrase(" ".join(words))


def test_words_that_changed_places_are_guessed() -> None:
    words = to_phrase(SEED)
    words[4], words[3] = words[3], words[4]
    with pytest.raises(BackupError, match="words 4 and 5 the other way round"):
        from_phrase(" ".join(words))


def test_a_phrase_that_nothing_explains_is_refused_all_the_same() -> None:
    words = to_phrase(SEED)
    words[5] = "cat"
    with pytest.raises(BackupError, match="compare each"):
        from_phrase(" ".join(words))


@given(st.text(max_size=300))
def test_garbage_is_never_a_phrase(text: str) -> None:
    with pytest.raises(BackupError):
        from_phrase(text)


def test_endless_text_is_refused_unread() -> None:
    with pytest.raises(BackupError, match="longer"):
        from_phrase("abandon " * 10**6)
