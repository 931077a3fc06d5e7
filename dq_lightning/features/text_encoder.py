"""Text encoders of transformers, loaded from the Hugging Face hub or from a folder and pooled as their files say."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision, TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.libraries import library_version
from dq_lightning.features.encoders import resolve_precision
from dq_lightning.features.origins import EncoderSpec, HubOrigin
from dq_lightning.features.text_card import MODULES, Card, Layer, read_card
from dq_lightning.identity.networks import WEIGHT_FILES
from dq_lightning.identity.values import digest_text

logger = logging.getLogger("dq_lightning")
# These files hold the tokenizer, the settings and the weights; documentation and other frameworks' weights are ignored.
FOLDER_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")
INSTEAD = (
    'pass the folder of a transformers model (config.json, tokenizer, weights), "openai:MODEL", or ready-made embeddings '
    "(an array or a .npy file) as encoder"
)
# The networks of transformers use these attribute names for learned embeddings of absolute positions.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
# Texts are cut to this many tokens if the model itself names no limit.
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class TextFolderOrigin(EncoderSpec):
    """A local folder with a transformers model and its tokenizer, and the settings of pooling, length and prompt."""

    path: Path
    settings: TextConfig

    def identity(self, memory: DigestMemory) -> str | None:
        files = model_files(self.path)
        files += [file for place in _module_folders(self.path) for file in sorted(place.iterdir()) if file.is_file()]
        names = [file.relative_to(self.path).as_posix() for file in files]
        digests = memory.files([str(file) for file in files])
        version = library_version("transformers")
        return digest_text("text_folder 2", version, *names, *digests, *_relevant(self.settings))

    def _load(self, device: torch.device, precision: Precision) -> "TokenEncoder":
        def locate(name: str) -> Path | None:
            file = self.path / name
            return file if file.is_file() else None

        return _load(str(self.path), None, locate, self.settings, device, precision)


@dataclass(frozen=True)
class TextHubOrigin(HubOrigin):
    """A transformers model on the Hugging Face hub, with the settings of pooling, normalisation, length and prompt."""

    settings: TextConfig
    instead: ClassVar[str] = INSTEAD

    @property
    def repository(self) -> str:
        return self.name

    def identity(self, memory: DigestMemory) -> str | None:
        commit = self.known_commit(memory)
        if commit is None:
            return None
        version = library_version("transformers")
        return digest_text("text_hub 2", version, self.name, commit, *_relevant(self.settings))

    def _load(self, device: torch.device, precision: Precision) -> "TokenEncoder":
        repository, commit = self.repository.partition("@")[0], self.find_commit()
        return _load(
            repository, commit, lambda name: self._locate(repository, commit, name), self.settings, device, precision
        )

    def _locate(self, repository: str, commit: str, name: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        # The local cache records that the hub has no such file, so the hub is not contacted again.
        if try_to_load_from_cache(repository, name, revision=commit) is _CACHED_NO_EXIST:
            return None
        try:
            return Path(hf_hub_download(repository, name, revision=commit))
        except EntryNotFoundError as error:
            # A `LocalEntryNotFoundError` means that the hub cannot be reached, not that the file does not exist.
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            raise FeatureError(
                f"{name} of {repository}, which says how it wants to be used, is not in the local Hugging Face cache and "
                "cannot be downloaded: connect to the internet once, or set config.text.pooling, "
                "config.text.max_length and config.text.prompt"
            ) from error


def text_origin(name: str, description: str, settings: TextConfig) -> TextFolderOrigin | TextHubOrigin:
    """Decide whether a name stands for a local folder or a model on the hub, without loading anything.

    The name is the path of a folder, optionally after `local-dir:`, or `OWNER/NAME[@REVISION]`, optionally after
    `hf-hub:`.

    Raises:
        FeatureError: `name` is a path of a folder without a model.
    """
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return TextFolderOrigin(name, description, folder.absolute(), settings)
    repository = name.removeprefix("hf-hub:")
    parts = repository.partition("@")[0].split("/")
    if name.startswith(("local-dir:", "/", ".", "~")) or "\\" in name or len(parts) > 2 or not all(parts):
        raise FeatureError(f"{name!r} is not a folder with a transformers model (config.json and weights): {INSTEAD}")
    return TextHubOrigin(repository, description, settings)


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that decide what transformers loads from it, sorted."""
    files = sorted(file for file in folder.iterdir() if file.suffix in FOLDER_SUFFIXES)
    if any(file.suffix == ".safetensors" for file in files):  # transformers ignores the others then
        files = [file for file in files if file.suffix != ".bin"]
    return files


def _relevant(settings: TextConfig) -> tuple[Any, ...]:
    return settings.pooling, settings.normalize, settings.max_length, repr(settings.prompt)


def _module_folders(place: Path) -> list[Path]:
    """Return the existing subfolders that `modules.json` names, sorted; none if it cannot be read."""
    try:
        modules = json.loads((place / MODULES).read_text(encoding="utf-8"))
        folders = {place / module["path"] for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):  # reported when the model is loaded
        return []
    return sorted(folder for folder in folders if folder.is_dir())


def _load(
    place: str,
    commit: str | None,
    locate: Callable[[str], Path | None],
    settings: TextConfig,
    device: torch.device,
    precision: Precision,
) -> "TokenEncoder":
    from transformers import AutoModel, AutoTokenizer

    def read(name: str) -> Any:
        file = locate(name)
        try:
            return None if file is None else json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FeatureError(f"{file} is not valid JSON ({error}): download the model again") from error

    known = settings.pooling != "auto" and None not in (settings.max_length, settings.prompt)
    card = Card() if known else read_card(read, place, whole=settings.pooling == "auto")
    pinned: dict[str, Any] = {"revision": commit} if commit is not None else {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **pinned)
        module, report = AutoModel.from_pretrained(
            place, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **pinned
        )
    except Exception as error:
        raise FeatureError(f"transformers cannot load {place}: {type(error).__name__}: {error}; {INSTEAD}") from error
    # Missing weights of a pooler or a decoder do no harm, because neither is used; any other part would be random.
    unused = ("decoder.", "lm_head.") if module.config.is_encoder_decoder else ()
    missing = [name for name in report["missing_keys"] if "pooler" not in name and not name.startswith(unused)]
    if missing:
        raise FeatureError(f"the weights in {place} lack {len(missing)} parameters, first {missing[0]}: {INSTEAD}")
    pooling = settings.pooling if settings.pooling != "auto" else card.pooling or "mean"
    prompted = bool(card.prompt if settings.prompt is None else settings.prompt)
    if prompted and pooling == "cls" and not card.pools_prompt:
        raise FeatureError(
            f"{place} takes the first token, but leaves the prompt out of the pooling: "
            "releases of sentence-transformers disagree on which "
            'token that is. Set config.text.pooling="cls" for the very first one, or config.text.prompt="" for no prompt'
        )
    heads = [_head(layer, locate, place) for layer in card.layers]
    _check_heads(heads, getattr(module.config, "hidden_size", None), place)
    return TokenEncoder(module, tokenizer, pooling, settings, card, heads, device, precision)


def _head(layer: Layer, locate: Callable[[str], Path | None], place: str) -> nn.Module:
    """Load a module that follows the pooling and maps float32 [B, D] to [B, E]; FeatureError if it cannot be loaded."""
    if layer.kind == "Normalize" or layer.config is None:
        return _Normalize()
    file = next((found for name in WEIGHT_FILES if (found := locate(f"{layer.path}/{name}")) is not None), None)
    bias = bool(layer.config.get("bias", True))
    linear = nn.utils.skip_init(nn.Linear, layer.config["in_features"], layer.config["out_features"], bias)  # type: ignore[no-untyped-call]
    try:
        if file is None:
            raise FileNotFoundError(f"there is no {' or '.join(WEIGHT_FILES)} in {layer.path}")
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        linear.load_state_dict({name.removeprefix("linear."): value.float() for name, value in state.items()})
    except Exception as error:
        raise FeatureError(
            f"the dense layer in {place} cannot be loaded ({type(error).__name__}: {error}): {INSTEAD}"
        ) from error
    activation = str(layer.config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    return nn.Sequential(linear, getattr(nn, activation)())


def _check_heads(heads: Sequence[nn.Module], width: int | None, place: str) -> None:
    try:
        if width is not None:
            nn.Sequential(*heads)(torch.zeros(1, width))
    except RuntimeError as error:
        raise FeatureError(
            f"the dense layers in {place} do not fit its network, which gives {width} numbers ({error}): {INSTEAD}"
        ) from error


class _Normalize(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return functional.normalize(features, dim=1)


class TokenEncoder:
    """A transformers model with its tokenizer and pooling; see `encoders.TextEncoder`.

    The network returns `last_hidden_state` [B, T, D]; only the encoder of an encoder-decoder is used. `settings` give
    length, prompt and normalisation, and `card` says how the model wants to be used. The heads are modules that follow
    the pooling, in order; pooling and heads are float32 whatever the precision of the network.
    """

    num_classes: None = None

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        pooling: str,
        settings: TextConfig,
        card: Card,
        heads: Sequence[nn.Module],
        device: torch.device,
        precision: Precision,
    ) -> None:
        self._tokenizer, self._pooling, self._normalize = tokenizer, pooling, settings.normalize
        self._device, self._card = device, card
        self._prompt = card.prompt if settings.prompt is None else settings.prompt
        # `settings.normalize` alone decides whether rows have length one, so a last `Normalize` module is dropped.
        heads = heads[:-1] if heads and isinstance(heads[-1], _Normalize) else heads
        self._heads = nn.Sequential(*heads).to(device).eval().requires_grad_(False)
        if module.config.is_encoder_decoder:
            module = module.get_encoder()
        self._module = module.to(device, resolve_precision(precision, device)).eval().requires_grad_(False)
        self._filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        most = _longest(tokenizer, module)
        self._unpooled = 0 if card.pools_prompt else self._prompt_tokens()
        self.max_length = min(settings.max_length or card.max_length or most or DEFAULT_LENGTH, most or 2**31)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, cut at `max_length`; a text without tokens becomes one padding token."""
        texts = [self._prompt + text for text in texts]
        texts = [text.lower() for text in texts] if self._card.lowers else texts
        made = self._tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=False, return_attention_mask=False
        )
        return [ids or [self._filler] for ids in made["input_ids"]]

    def embed(self, tokens: Tensor) -> Tensor:
        """Return features float32 [B, D] of token ids int64 [B, T], which are padded with -1 after each text."""
        tokens = tokens.to(self._device, non_blocking=True)
        mask = tokens >= 0
        with torch.no_grad():
            output = self._module(input_ids=torch.where(mask, tokens, self._filler), attention_mask=mask.long())
            if self._unpooled and self._pooling in ("mean", "max"):
                pooled = mask.clone()
                pooled[:, : self._unpooled] = False
                mask = torch.where(pooled.any(dim=1, keepdim=True), pooled, mask)
            features = self._heads(pool_tokens(output.last_hidden_state, mask, self._pooling))
        return functional.normalize(features, dim=1) if self._normalize else features

    def replica(self, device: torch.device) -> "TokenEncoder":
        """Return a copy with networks of its own on another device, of the same precision."""
        twin = copy.copy(self)
        twin._device = device
        twin._module, twin._heads = copy.deepcopy(self._module).to(device), copy.deepcopy(self._heads).to(device)
        return twin

    def _prompt_tokens(self) -> int:
        """Return the number of tokens of the prompt, including special tokens at its beginning but not at its end."""
        ids = self._tokenizer(self._prompt)["input_ids"] if self._prompt else []
        return len(ids) - (1 if ids and ids[-1] in self._tokenizer.all_special_ids else 0)


def pool_tokens(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool the states of tokens, floating [B, T, D], to one feature vector float32 [B, D] for each text.

    The mask, bool [B, T], is True for the tokens that are pooled; for `"cls"` and `"last"` these must come first in
    each row. The pooling is `"mean"` or `"max"` over the tokens, or the state of the first (`"cls"`) or the `"last"`
    token.
    """
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()
    if pooling == "max":
        return states.float().masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    # For float32 states, a matrix product with the weights avoids a weighted copy of all states.
    weights = mask / mask.sum(1, keepdim=True)
    if states.dtype == torch.float32:
        return torch.bmm(weights[:, None], states)[:, 0]
    return (states.float() * weights[..., None]).sum(dim=1)


def _longest(tokenizer: Any, module: Any) -> int | None:
    """Return the largest number of tokens that the model can read, or None if neither it nor its tokenizer says."""
    limits = [tokenizer.model_max_length, getattr(module.config, "max_position_embeddings", None)]
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # RoBERTa and its variants number positions from the padding index plus one, so 512 of 514 rows are used.
            limits.append(part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1))
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known) if known else None
