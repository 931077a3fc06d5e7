"""What the files of a text encoder say about its use: sentence-transformers' `modules.json` and what it names. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dq_lightning.errors import FeatureError

CARD_FILES = ("modules.json", "sentence_bert_config.json")
# the switches of a pooling module's config.json, and what `pool_tokens` calls them
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_ADVICE = 'set config.text.pooling to "mean" or "cls" to use the network without it, or pass another encoder'


@dataclass(frozen=True)
class Card:
    """How an encoder wants to be used.

    Attributes:
        pooling: `"mean"`, `"cls"`, `"max"`, `"last"`, or None when nothing is said.
        max_length: tokens it is meant to read, or None.
    """

    pooling: str | None = None
    max_length: int | None = None


def read_card(files: Mapping[str, Any], read: Callable[[str], Any], place: str) -> Card:
    """Understand a model's files.

    Args:
        files: parsed content of `CARD_FILES`, None where there is no such file.
        read: the parsed content of a further file, None where there is none.
        place: of the model, for messages.

    Raises:
        FeatureError: the files ask for a layer or a pooling that is not known here.
    """
    length = (files.get("sentence_bert_config.json") or {}).get("max_seq_length")
    pooling = None
    for module in files.get("modules.json") or ():
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(read(f"{module['path']}/config.json") or {}, place)
        elif kind not in ("Transformer", "Normalize"):
            raise FeatureError(f"{place} has a layer {kind!r} behind its pooling, which is not supported: {_ADVICE}")
    return Card(pooling, int(length) if length else None)


def _pooling(config: Mapping[str, Any], place: str) -> str:
    named = config.get("pooling_mode")
    wanted = [named] if isinstance(named, str) else list(named or ())
    wanted += [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    known = {_SWITCHES.get(name) or _NAMES.get(name) for name in wanted}
    if len(known) != 1 or None in known:
        raise FeatureError(
            f"{place} pools its tokens by {', '.join(map(str, wanted)) or 'nothing'}, which is not supported: {_ADVICE}"
        )
    return str(known.pop())
