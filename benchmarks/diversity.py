"""Measures how diverse the rows of a subset are: distances, clusters, verbs, response lengths. Pure functions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.bins.clusters import Rows
from dq_lightning.evaluation.baselines import response_lengths
from dq_lightning.sources.prompts import choose_template, columns_of

_BLOCK = 1024
# A polite beginning of an instruction, which is skipped, and first words that are not the verb of an instruction.
_COURTESY = re.compile(
    r"^(please|kindly|(can|could|would|will) you( please)?|i (want|need|would like) you to|you (must|should))[\s,]+"
)
# fmt: off
_NO_VERBS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its",
    "our", "their", "i", "you", "he", "she", "it", "we", "they", "what", "which", "who",
    "whom", "whose", "when", "where", "why", "how", "is", "are", "was", "were", "do", "does",
    "did", "can", "could", "would", "should", "will", "has", "have", "had", "if", "in", "on",
    "at", "of", "for", "from", "to", "with", "by", "as", "given", "there", "and", "or",
    "but", "not", "no", "yes",
))
# fmt: on


@dataclass(frozen=True)
class Diversity:
    """Measures of how diverse the kept rows are.

    Attributes:
        rows: number of kept rows.
        neighbour_distance: mean Euclidean distance of a kept row's unit embedding to that of the nearest other kept
            row.
        clusters: number of clusters of the whole dataset that hold a kept row.
        verbs: number of distinct verbs that instructions begin with, see `instruction_verb`.
        response_length: mean number of characters of the responses.
    """

    rows: int
    neighbour_distance: float
    clusters: int
    verbs: int
    response_length: float


def measure_diversity(
    rows: Sequence[Any], features: Rows, clusters: NDArray[np.int64], index: NDArray[np.int64]
) -> Diversity:
    """Measure the diversity of a subset.

    Args:
        rows: all N rows.
        features: float32 [N, D], embeddings of length one.
        clusters: int64 [N], cluster of every row, as `kmeans` returns them.
        index: int64 [M], positions of the kept rows, at least two.

    Raises:
        SourceError: the columns of the rows fit no template, or a cell is not text.

    Complexity: O(M M D), memory O(M D).
    """
    kept = [rows[int(i)] for i in index]
    template = choose_template(columns_of(kept))
    asked = [template.embedded_text(row, "instruction") for row in kept]
    verbs = {verb for text in asked if (verb := instruction_verb(text)) is not None}
    return Diversity(
        rows=len(index),
        neighbour_distance=float(neighbour_distances(features[index]).mean()),
        clusters=len(np.unique(clusters[index])),
        verbs=len(verbs),
        response_length=float(response_lengths(kept).mean()),
    )


def neighbour_distances(rows: Rows) -> NDArray[np.float64]:
    """Return the Euclidean distance of every row to the nearest other row, float64 [M].

    Args:
        rows: float32 [M, D], rows of length one, at least two.
    """
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        cosine = rows[start : start + _BLOCK] @ rows.T
        places = np.arange(len(cosine))
        cosine[places, start + places] = -np.inf
        best = cosine.argmax(axis=1)
        # The distance is computed from the difference, because 2 - 2 cos has no digits left for near-duplicates.
        gap = rows[start : start + _BLOCK].astype(np.float64) - rows[best]
        nearest[start : start + len(cosine)] = np.linalg.norm(gap, axis=1)
    return nearest


def instruction_verb(text: str) -> str | None:
    """Return the verb that an instruction begins with, found by a rule of thumb, or None.

    The verb is the first word, in lower case, after "please", "can you" and the like, unless that word is an article,
    pronoun, question word, auxiliary or preposition. No dictionary is used, so a noun at the beginning counts as a
    verb.

    >>> instruction_verb("Could you please Rewrite this?"), instruction_verb("What is an atom?"), instruction_verb("")
    ('rewrite', None, None)
    """
    word = re.match(r"[^\W\d_]+", _COURTESY.sub("", text.strip().lower()))
    return None if word is None or word[0] in _NO_VERBS else word[0]
