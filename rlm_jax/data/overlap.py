"""Does a test problem stand in the training data? A run asks before it starts, and refuses.

The one idea: three questions of rising suspicion, each about keys in a hash table of the test set,
so that training data of any size streams past once. *Exact*: the same text but for case, spacing
and punctuation. *Permuted*: the same words and numbers in any order. *N-gram*: how much of a test
problem's runs of 13 words (8 in short ones) stand somewhere in the training data (Brown et al.
2020, 2005.14165, appendix C). Puzzles bring keys of their own: Countdown's numbers and target,
say, in order for *exact* and sorted for *permuted*.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlm_jax.tasks.base import Problem

NGRAM_WORDS = 13
SHORT_NGRAM_WORDS = 8

# Signs that make another problem of the same words; other punctuation does not.
_WORD = re.compile(r"[0-9]+(?:\.[0-9]+)?|[^\W\d_]+|[-+*/=()^<>%\u2212\u00d7\u00f7]")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

Item = str | Problem
KeyFn = Callable[[Any], Hashable]


class Match(NamedTuple):
    """A pair that offends: its kind, the places in both data sets, the share of equal n-grams."""

    kind: str
    train: int
    test: int
    share: float


class Overlap(NamedTuple):
    """What was found.

    Attributes:
      num_train, num_test: problems looked at.
      matches: per test problem that stands in the training data its first match, by the strictest
        kind that holds ("exact", "permuted", "ngram"), in the order of the test set.
      ngram_share: [num_test], the share of each test problem's n-grams that the training data
        holds; 0 where it is too short to have any, or where n-grams were not looked at.
    """

    num_train: int
    num_test: int
    matches: list[Match]
    ngram_share: np.ndarray

    def count(self, kind: str) -> int:
        """How many test problems have their match by `kind`."""
        return sum(match.kind == kind for match in self.matches)


def split_words(item: Item) -> list[str]:
    """Words, numbers and mathematical signs of a text, in one spelling each."""
    text = item if isinstance(item, str) else item.question
    text = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_THOUSANDS.sub("", text))


def exact_text(item: Item) -> str:
    """Equal for texts that differ in case, spacing and punctuation only."""
    return " ".join(split_words(item))


def permuted_text(item: Item) -> str:
    """Equal for texts of the same words and numbers."""
    return " ".join(sorted(split_words(item)))


def find_overlap(
    train: Iterable[Any],
    test: Iterable[Any],
    *,
    exact_key: KeyFn = exact_text,
    permuted_key: KeyFn | None = permuted_text,
    ngram_words: int | None = NGRAM_WORDS,
    max_ngram_share: float = 0.8,
) -> Overlap:
    """Compares training with test problems; the training side may be a generator.

    Args:
      train, test: texts or problems; anything at all when the keys are the caller's own and
        `ngram_words` is None.
      exact_key, permuted_key: equal for problems that are the same; None leaves a kind out.
      ngram_words: words of an n-gram, None to leave these out. Test problems of fewer words are
        compared by `SHORT_NGRAM_WORDS`, and not at all below that.
      max_ngram_share: a test problem with a larger share of its n-grams in the training data
        counts as a match. (The published GSM8K split has one pair at 0.54.)

    Raises:
      ValueError: n-grams of less than two words, or a share outside [0, 1).
    """
    if ngram_words is not None and ngram_words < 2:
        raise ValueError(f"ngram_words must be at least 2, not {ngram_words}")
    if not 0.0 <= max_ngram_share < 1.0:
        raise ValueError(f"max_ngram_share must lie in [0, 1), not {max_ngram_share}")
    test = list(test)
    key_fns = {"exact": exact_key} | ({"permuted": permuted_key} if permuted_key else {})
    tables = {kind: _group(test, key_fn) for kind, key_fn in key_fns.items()}
    grams = _Grams(test, ngram_words or 0)
    found: dict[str, dict[int, int]] = {kind: {} for kind in key_fns}
    num_train = 0
    for num_train, item in enumerate(train, start=1):
        for kind, key_fn in key_fns.items():
            for place in tables[kind].get(key_fn(item), ()):
                found[kind].setdefault(place, num_train - 1)
        grams.read(num_train - 1, item)
    shares = grams.shares()
    found["ngram"] = {
        int(i): grams.likeliest(int(i)) for i in np.flatnonzero(shares > max_ngram_share)
    }
    matches = []
    for place in range(len(test)):
        kinds = [kind for kind, places in found.items() if place in places]
        if kinds:
            matches.append(Match(kinds[0], found[kinds[0]][place], place, float(shares[place])))
    return Overlap(num_train, len(test), matches, shares)


def require_disjoint(train: Iterable[Any], test: Iterable[Any], **options: Any) -> Overlap:
    """Refuses training data that holds a test problem; `options` are those of `find_overlap`.

    Returns:
      The overlap: no matches, and the shares of n-grams below the limit, for the run's log.

    Raises:
      ValueError: names the first pair of the strictest kind and counts the others.
    """
    train, test = list(train), list(test)
    overlap = find_overlap(train, test, **options)
    if not overlap.matches:
        return overlap
    kinds = ("exact", "permuted", "ngram")
    first = min(overlap.matches, key=lambda match: kinds.index(match.kind))
    counts = ", ".join(f"{overlap.count(kind)} {kind}" for kind in kinds)
    raise ValueError(
        f"{len(overlap.matches)} of {overlap.num_test} test problems stand in the training data "
        f"({counts}). First: test problem {first.test} {_show(test[first.test])} and training "
        f"example {first.train} {_show(train[first.train])} ({first.kind})"
    )


class _Grams:
    """Which n-grams of the test problems came by, and where first; of 0 words, none."""

    def __init__(self, test: Sequence[Any], num_words: int):
        self._of_test: list[list[int]] = []
        sizes = set()
        for item in test if num_words else ():
            words = split_words(item)
            size = num_words if len(words) >= num_words else SHORT_NGRAM_WORDS
            self._of_test.append(sorted(set(_hash_grams(words, size))))
            sizes.add(size)
        self._num_test = len(test)
        self._sizes = sorted(sizes)
        self._wanted = {gram for grams in self._of_test for gram in grams}
        self._first_train: dict[int, int] = {}

    def read(self, place: int, item: Any) -> None:
        """Looks for the wanted n-grams in one training example."""
        if not self._wanted:
            return
        words = split_words(item)
        for size in self._sizes:
            for gram in self._wanted.intersection(_hash_grams(words, size)):
                self._first_train.setdefault(gram, place)

    def shares(self) -> np.ndarray:
        shares = np.zeros(self._num_test)
        for i, grams in enumerate(self._of_test):
            if grams:
                shares[i] = sum(gram in self._first_train for gram in grams) / len(grams)
        return shares

    def likeliest(self, test: int) -> int:
        """The training example in which most of a test problem's n-grams were seen first."""
        seen = (self._first_train.get(gram) for gram in self._of_test[test])
        counts = Counter(place for place in seen if place is not None)
        return min(counts, key=lambda place: (-counts[place], place))


def _hash_grams(words: Sequence[str], size: int) -> list[int]:
    return [hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)]


def _group(items: Sequence[Any], key_fn: KeyFn) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key_fn(item), []).append(place)
    return groups


def _show(item: Any) -> str:
    text = item.question if isinstance(item, Problem) else str(item)
    return repr(text if len(text) <= 80 else text[:77] + "...")
