"""How varied the rows of a subset are: distances, clusters, verbs, response lengths. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.evaluation.baselines import response_lengths
from dq_lightning.evaluation.kmeans import Rows
from dq_lightning.sources.prompts import choose_template, columns_of

_BLOCK = 1024
# what a polite or asking instruction begins with before it comes to the point, and words that begin one without a verb
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
    """How varied the kept rows are.

    Attributes:
        rows: kept.
        neighbour_distance: mean Euclidean distance of a kept row's unit embedding to the nearest other kept one.
        clusters: of the whole set that hold a kept row.
        verbs: distinct verbs that instructions begin with, see `instruction_verb`.
        response_length: mean characters of the responses.
    """

    rows: int
    neighbour_distance: float
    clusters: int
    verbs: int
    response_length: float


def measure_diversity(
    rows: Sequence[Any], features: Rows, clusters: NDArray[np.int64], index: NDArray[np.int64]
) -> Diversity:
    """Describe a subset.

    Args:
        rows: all N rows.
        features: float32 [N, D], of length one.
        clusters: int64 [N], the cluster of every row, as `kmeans` gives them.
        index: int64 [M], the kept rows, at least two.

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
    """Euclidean distance of every unit row to the nearest other one, float64 [M]."""
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        cosine = rows[start : start + _BLOCK] @ rows.T
        places = np.arange(len(cosine))
        cosine[places, start + places] = -np.inf
        best = cosine.argmax(axis=1)
        # from the difference itself: 2 - 2 cos has no digits left for near-duplicates
        gap = rows[start : start + _BLOCK].astype(np.float64) - rows[best]
        nearest[start : start + len(cosine)] = np.linalg.norm(gap, axis=1)
    return nearest


def instruction_verb(text: str) -> str | None:
    """The verb that an instruction begins with, by a rule of thumb, or None.

    It is the first word in lower case, after "please", "can you" and the like, unless it is an article, pronoun, question
    word, auxiliary or preposition. No dictionary is asked, so a noun that begins an instruction counts.

    >>> instruction_verb("Could you please Rewrite this?"), instruction_verb("What is an atom?"), instruction_verb("")
    ('rewrite', None, None)
    """
    word = re.match(r"[^\W\d_]+", _COURTESY.sub("", text.strip().lower()))
    return None if word is None or word[0] in _NO_VERBS else word[0]
