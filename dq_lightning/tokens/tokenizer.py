"""Loads and checks the tokenizer of a language model. This is the only file that loads tokenizers of transformers."""

from pathlib import Path
from typing import Any

from dq_lightning.core.errors import ConfigError


def load_tokenizer(given: Any) -> Any:
    """Return a tokenizer that rows can be encoded with.

    Args:
        given: tokenizer of transformers, which is returned unchanged, or the name or folder of one, which is loaded.

    Raises:
        ConfigError: it cannot be loaded, is not a tokenizer, or has no end-of-sequence token.
    """
    tokenizer = _from_transformers(str(given)) if isinstance(given, str | Path) else given
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ConfigError(
            f"tokenizer= takes a tokenizer of transformers, or the name or folder of one, got {type(given).__name__}: "
            "wrap one of the tokenizers package in transformers.PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where a response ends: set "
            "tokenizer.eos_token to a token of its vocabulary"
        )
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """Return the id of the token that batches are padded with.

    A tokenizer without a padding token pads with its end-of-sequence token; padding is masked in either case.
    """
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _from_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer {name!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}): check the "
            "name, or pass a folder that holds the tokenizer's files, or the tokenizer itself"
        ) from error
