"""A peer's key as 24 words for paper: BIP-39 in English, with the 32 bytes of the Ed25519 seed as its entropy.

The words are the key itself: nothing is derived from them, and there is no passphrase. Their checksum has 8 bits, so
that of 256 phrases with a wrong word one is taken, for another peer's. Then the peer id tells.
https://github.com/bitcoin/bips/blob/master/bip-0039.mediawiki
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import islice
from typing import Final

from mnemonic import Mnemonic

from potluck.errors import BackupError

WORDS: Final = 24
#: Of a phrase as it is typed or read, with numbers and blanks: several times what 24 words can have.
MAX_CHARACTERS: Final = 2048
#: Wrong words, and guesses at right ones, that an error names.
_NAMED: Final = 3


def to_phrase(seed: bytes) -> list[str]:
    """The 24 words of a 32-byte seed."""
    return _english().to_mnemonic(seed).split()


def words_of(text: str) -> list[str]:
    """Its words, however they were spaced, numbered and capitalized."""
    return [word.lower() for word in text.split() if not re.fullmatch(r"\d+[.:)]?", word)]


def from_phrase(text: str) -> bytes:
    """The 32-byte seed. Raises BackupError that names the words that are wrong, as far as that can be told."""
    if len(text) > MAX_CHARACTERS:
        raise BackupError(f"a recovery phrase is {WORDS} words, and this is much longer")
    words = words_of(text)
    if unknown := [at for at, word in enumerate(words) if word not in _english().wordlist]:
        named = [_unknown(words, at) for at in unknown[:_NAMED]]
        more = [f"and {len(unknown) - _NAMED} more"] if len(unknown) > _NAMED else []
        raise BackupError(f"not words of a recovery phrase: {'; '.join([*named, *more])}")
    if len(words) != WORDS:
        raise BackupError(f"a recovery phrase has {WORDS} words, and these are {len(words)}")
    if (seed := _seed(words)) is None:
        guesses = "; or ".join(islice(_slips(words), _NAMED))
        hint = f"perhaps {guesses}" if guesses else "compare each with what you wrote down, and their order"
        raise BackupError(f"these words are no recovery phrase, their checksum does not fit: {hint}")
    return seed


def _unknown(words: Sequence[str], at: int) -> str:
    """Names a word and the nearest, of which the checksum may know which it was if all others are right."""
    near = _near(words[at][:20])
    near = [other for other in near if _seed([*words[:at], other, *words[at + 1 :]])] or near
    return f"word {at + 1}, {words[at][:20]!r}" + (f" (perhaps {' or '.join(near[:_NAMED])})" if near else "")


def _near(word: str) -> list[str]:
    """Four letters tell the words of the list apart: many write down no more."""
    known = _english().wordlist
    begun = [other for other in known if len(word) > 3 and other[:4] == word[:4] and other != word]
    return begun + [other for other in get_close_matches(word, known, n=20) if other not in (word, *begun)]


def _slips(words: Sequence[str]) -> Iterator[str]:
    """What one slip would explain: neighbours that changed places, or a word for one that is much like it."""
    for at in range(len(words) - 1):
        one, other = words[at : at + 2]
        if _seed([*words[:at], other, one, *words[at + 2 :]]):
            yield f"words {at + 1} and {at + 2} the other way round"
    for at, word in enumerate(words):
        for other in _near(word)[:6]:
            if _seed([*words[:at], other, *words[at + 1 :]]):
                yield f"word {at + 1} {other!r} instead of {word!r}"


def _seed(words: list[str]) -> bytes | None:
    """None if the checksum does not fit."""
    try:
        return bytes(_english().to_entropy(words))
    except ValueError:
        return None


@cache
def _english() -> Mnemonic:
    return Mnemonic("english")
