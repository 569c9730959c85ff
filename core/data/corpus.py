"""Which sentences of a crude corpus are worth a vector: each once, short enough for CLIP, English; as text tables.

The released selection of DIME-FM was never shown; this is the pipeline that section 6 of its notes recommends. What
is left is then chosen by what images show: `core.features.select`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.data.sentences import prompt, templates
from core.data.tsv import write_index
from core.models.text import SLOTS, tokens
from core.storage import Store

Flags = NDArray[np.bool_]
MOST_BETWEEN = SLOTS - 2  # tokens, as a start and an end token stand around them
# Function words of English, and such of other languages in Latin script as are no English words.
ENGLISH, FOREIGN = (
    frozenset(words.split())
    for words in (
        "the a an of and in on with is are to at for by from this that his her its it",
        "der das und ein eine einen mit von auf im zu den le la les des une et dans avec du sur el los las con del por "
        "una il gli di nel della che um uma em com não het een van op met och att som",
    )
)
ROWS_OF_TABLE = 1 << 16


def admissible(sentences: Iterable[str], english: float) -> Flags:
    """(N,) whether each is the first of its kind, fits CLIP's 77 slots with start and end, and is English.

    english: least share of a sentence's letters that are ASCII; 0 takes every language.
    """
    seen, good = array("Q"), bytearray()  # of so many sentences that lists would not do
    for text in sentences:
        plain = " ".join(text.split()).casefold()
        seen.append(int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest()))
        good.append(bool(plain) and fits(text) and (english <= 0 or is_english(text, english)))
    flags = np.array(good, bool)
    flags[_repeated(np.array(seen, np.uint64))] = False
    return flags


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows whose hash an earlier row has."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return np.flatnonzero(again)


def fits(text: str) -> bool:
    """Whether no token is cut off."""
    return len(text.encode()) <= MOST_BETWEEN or len(tokens(text)) <= SLOTS  # a token is a byte at least


def is_english(text: str, share: float) -> bool:
    """By its letters, and by which language's function words it has: a cheap test, wrong for some names and titles."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters or sum(letter.isascii() for letter in letters) < share * len(letters):
        return False
    words = re.findall(r"\w+", text.lower())
    foreign = sum(word in FOREIGN for word in words)
    return foreign < 2 or foreign <= sum(word in ENGLISH for word in words)


def class_prompts(names: Sequence[str]) -> list[str]:
    """Every class name in each of the 81 templates."""
    return [prompt(template, name) for name in names for template in templates()]


class TableWriter:
    """Pairs of tables in a folder: sentences, and row for row their vectors, with indexes and, at the end, lists."""

    def __init__(self, store: Store) -> None:
        self._store, self._names = store, list[str]()
        self._texts, self._vectors = list[str](), list[str]()
        self.rows = 0

    def add(self, key: str, text: str, vector: NDArray[np.float32]) -> None:
        """vector: (D,)."""
        self._texts.append(f"{key}\t{json.dumps({'captions': [text]}, ensure_ascii=False)}\n")
        self._vectors.append(f"{key}\t{base64.b64encode(vector.astype('<f4').tobytes()).decode()}\n")
        self.rows += 1
        if len(self._texts) == ROWS_OF_TABLE:
            self._flush()

    def close(self) -> None:
        """Raises StoreError.  Without the lists, which come last, an unfinished folder is told from a whole one."""
        self._flush()
        for role, suffix in (("text", ""), ("text_feat", ".feat")):
            self._store.put(f"{role}.list", "".join(f"{name}{suffix}.tsv\n" for name in self._names).encode())

    def _flush(self) -> None:
        if not self._texts:
            return
        name = f"text_{len(self._names):05d}"
        for key, lines in ((f"{name}.tsv", self._texts), (f"{name}.feat.tsv", self._vectors)):
            self._store.put(key, "".join(lines).encode())
            write_index(self._store, key)
        self._names.append(name)
        self._texts, self._vectors = [], []
