"""Text encoders of transformers, by hub name or from a folder, pooled as their files say. Opens disk and network."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from dq_lightning.config import Precision, TextConfig
from dq_lightning.describe import digest_text
from dq_lightning.errors import DQError, FeatureError
from dq_lightning.features.encoders import resolve_device, resolve_precision
from dq_lightning.features.text_card import CARD_FILES, Card, read_card
from dq_lightning.records import DigestMemory
from dq_lightning.weights import find_commit

logger = logging.getLogger("dq_lightning")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# the tokenizer, the settings and the weights of a folder; not its documentation or other frameworks' weights
FOLDER_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")
INSTEAD = (
    'pass the folder of a transformers model (config.json, tokenizer, weights), "openai:MODEL", or ready-made embeddings '
    "(an array or a .npy file) as encoder"
)
# longest text of a model that names no limit itself
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class TextFolderOrigin:
    """A folder with a transformers model and its tokenizer.

    Attributes:
        path: the folder.
        settings: how its tokens are pooled.
    """

    path: Path
    settings: TextConfig

    def identity(self, memory: DigestMemory) -> str | None:
        files = sorted(file for file in self.path.iterdir() if file.suffix in FOLDER_SUFFIXES)
        if any(file.suffix == ".safetensors" for file in files):  # then transformers does not read the others
            files = [file for file in files if file.suffix != ".bin"]
        files += [file for file in sorted(self.path.glob("*/config.json")) if file.is_file()]
        names = [file.relative_to(self.path).as_posix() for file in files]
        digests = memory.files([str(file) for file in files])
        return digest_text("text_folder", *names, *digests, *_relevant(self.settings))

    def resolve(self, memory: DigestMemory) -> Self:
        return self

    def load(self, device: str, precision: Precision) -> "TokenEncoder":
        def read(name: str) -> Any:
            file = self.path / name
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

        return _load(str(self.path), None, read, self.settings, device, precision)


@dataclass(frozen=True)
class TextHubOrigin:
    """A model on the Hugging Face hub, pinned to a commit before it is loaded; see `TimmHubOrigin`.

    Attributes:
        name: `OWNER/NAME[@REVISION]`.
        settings: how its tokens are pooled.
        commit: hash of the commit, or None while unknown.
    """

    name: str
    settings: TextConfig
    commit: str | None = None

    def identity(self, memory: DigestMemory) -> str | None:
        commit = self.commit or memory.recall(f"hub:{self.name}")
        return None if commit is None else digest_text("text_hub", self.name, commit, *_relevant(self.settings))

    def resolve(self, memory: DigestMemory) -> Self:
        commit = self.commit or memory.recall(f"hub:{self.name}") or self._find_commit()
        memory.remember(f"hub:{self.name}", commit)
        return replace(self, commit=commit)

    def load(self, device: str, precision: Precision) -> "TokenEncoder":
        repository = self.name.partition("@")[0]
        commit = self.commit or self._find_commit()
        return _load(
            repository, commit, lambda name: self._read(repository, commit, name), self.settings, device, precision
        )

    def _find_commit(self) -> str:
        repository, _, revision = self.name.partition("@")
        try:
            return find_commit(repository, revision or None, WEIGHT_FILES)
        except DQError as error:
            raise FeatureError(f"encoder {self.name!r} needs {error}, or {INSTEAD}") from error

    def _read(self, repository: str, commit: str, name: str) -> Any:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = hf_hub_download(repository, name, revision=commit)
        except EntryNotFoundError as error:
            # not reachable is not the same as not there
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            raise FeatureError(
                f"{name} of {repository}, which says how its tokens are pooled, is not in the local Hugging Face cache and "
                "cannot be downloaded: connect once, or set config.text.pooling and config.text.max_length"
            ) from error
        return json.loads(Path(file).read_text(encoding="utf-8"))


def text_origin(name: str, settings: TextConfig) -> TextFolderOrigin | TextHubOrigin:
    """What the name of a transformers model stands for; nothing is loaded.

    Raises:
        FeatureError: it is a path without a model.
    """
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return TextFolderOrigin(folder.absolute(), settings)
    repository = name.removeprefix("hf-hub:")
    parts = repository.partition("@")[0].split("/")
    if name.startswith(("local-dir:", "/", ".", "~")) or "\\" in name or len(parts) > 2 or not all(parts):
        raise FeatureError(f"{name!r} is no folder with a transformers model (config.json and weights): {INSTEAD}")
    return TextHubOrigin(repository, settings)


def _relevant(settings: TextConfig) -> tuple[Any, ...]:
    return settings.pooling, settings.normalize, settings.max_length


def _load(
    place: str,
    commit: str | None,
    read: Callable[[str], Any],
    settings: TextConfig,
    device: str,
    precision: Precision,
) -> "TokenEncoder":
    from transformers import AutoModel, AutoTokenizer

    known = settings.pooling != "auto" and settings.max_length is not None
    card = Card() if known else read_card({name: read(name) for name in CARD_FILES}, read, place)
    pinned: dict[str, Any] = {"revision": commit} if commit is not None else {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **pinned)
        module, report = AutoModel.from_pretrained(
            place, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **pinned
        )
    except Exception as error:
        raise FeatureError(f"transformers cannot load {place}: {type(error).__name__}: {error}; {INSTEAD}") from error
    # a pooler that the files lack is not used; anything else would be random
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise FeatureError(f"the weights in {place} lack {len(missing)} parameters, first {missing[0]}: {INSTEAD}")
    pooling = settings.pooling if settings.pooling != "auto" else card.pooling or "mean"
    return TokenEncoder(module, tokenizer, pooling, settings, card, resolve_device(device), precision)


class TokenEncoder:
    """A transformers model with its tokenizer and pooling; see `encoders.TextEncoder`.

    Args:
        module: gives `last_hidden_state` [B, T, D]; of an encoder-decoder only the encoder is used.
        tokenizer: of the model.
        pooling: `"mean"`, `"cls"`, `"max"` or `"last"`.
        settings: length and normalisation.
        card: what the model's files say.
        device: where to run.
        precision: of the network; pooling is float32.
    """

    num_classes: None = None

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        pooling: str,
        settings: TextConfig,
        card: Card,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self._tokenizer, self._pooling, self._normalize = tokenizer, pooling, settings.normalize
        self._device = device
        if module.config.is_encoder_decoder:
            module = module.get_encoder()
        self._module = module.to(device, resolve_precision(precision, device)).eval().requires_grad_(False)
        self._filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        most = _longest(tokenizer, module.config)
        self.max_length = min(settings.max_length or card.max_length or most or DEFAULT_LENGTH, most or 2**31)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, cut at `max_length`; a text without any token is one filler."""
        made = self._tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=False, return_attention_mask=False
        )
        return [ids or [self._filler] for ids in made["input_ids"]]

    def embed(self, tokens: Tensor) -> Tensor:
        """Features float32 [B, D] of token ids int64 [B, T], -1 behind the end."""
        tokens = tokens.to(self._device, non_blocking=True)
        mask = tokens >= 0
        with torch.no_grad():
            output = self._module(input_ids=torch.where(mask, tokens, self._filler), attention_mask=mask.long())
            features = pool_tokens(output.last_hidden_state, mask, self._pooling)
        return functional.normalize(features, dim=1) if self._normalize else features


def pool_tokens(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Features float32 [B, D] of token states [B, T, D].

    Args:
        states: of the last layer.
        mask: bool [B, T], True for tokens; every row begins with one.
        pooling: `"mean"` over the tokens, their `"max"`, the first (`"cls"`) or the `"last"`.
    """
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()
    if pooling == "max":
        return states.float().masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    # a product with the mask sums in float32 without a float32 copy of the states
    weights = mask / mask.sum(1, keepdim=True)
    if states.dtype == torch.float32:
        return torch.bmm(weights[:, None], states)[:, 0]
    return (states.float() * weights[..., None]).sum(dim=1)


def _longest(tokenizer: Any, config: Any) -> int | None:
    """Tokens that the model can read; None when it names no limit."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known) if known else None
