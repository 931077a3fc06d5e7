"""Token loaders for a data module: the rows of a dataset are encoded once, and every later loader reuses them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, default_collate

from dq_lightning.core.config import OnError, TextConfig
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.loading.loaders import LoaderSettings
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.tokens.batches import PackedRows, make_token_loader
from dq_lightning.tokens.rows import TokenRows, check_rows, encode_rows
from dq_lightning.tokens.tokenizer import load_tokenizer, padding_id


class TokenLoading:
    """Encodes datasets of rows with one tokenizer and makes loaders of them.

    The tokenizer is one of transformers, or its name or folder. Of the settings, `template`, `columns`,
    `use_chat_template`, `train_length` and `pack_rows` are used.

    Raises:
        ConfigError: the tokenizer cannot be loaded or used.
    """

    def __init__(self, tokenizer: Any, config: TextConfig, seed: int, on_error: OnError = "raise") -> None:
        self.config, self.seed = config, seed
        self._tokenizer = load_tokenizer(tokenizer)
        # How rows are written as text: arguments of `encode_rows` and `check_rows`.
        self._writing: dict[str, Any] = {
            "template": config.template,
            "columns": config.columns,
            "use_chat_template": config.use_chat_template,
            "on_error": on_error,
        }
        # The dataset is kept beside its encoded rows, so that no other dataset can get the same id.
        self._encoded: dict[int, tuple[Any, TokenRows]] = {}

    def rows(self, dataset: Any, positions: Sequence[int] | None = None, name: str = "") -> TokenRows:
        """Return the encoded rows of a dataset; they are encoded at the first call.

        The positions of the rows in the original data, and the name of the dataset, are for messages.

        Raises:
            ConfigError: as in `encode_rows`.
            SourceError: as in `encode_rows`.
        """
        if id(dataset) not in self._encoded:
            length = self.config.train_length
            with _naming(name):
                rows = encode_rows(
                    _by_position(dataset), self._tokenizer, max_length=length, positions=positions, **self._writing
                )
            self._encoded[id(dataset)] = dataset, rows
        return self._encoded[id(dataset)][1]

    def check(self, dataset: Any, name: str = "") -> None:
        """Check that every row of a dataset can be written as text, without encoding it.

        Raises:
            SourceError: a row cannot be written; with `on_error="skip"`, no row can be written.
        """
        with _naming(name):
            check_rows(_by_position(dataset), self._tokenizer, **self._writing)

    def loader(self, dataset: Any, settings: LoaderSettings, facts: TrainerFacts, *, name: str = "") -> DataLoader[Any]:
        """Make a loader of token batches.

        With `settings.shuffle`, batches hold rows of similar length and come in a new order every epoch. Without it,
        the rows come in order and are never packed.

        Raises:
            ConfigError: the settings draw rows by weights or with replacement.
            SourceError: a row cannot be written, as in `encode_rows`.
        """
        if settings.weights is not None or settings.replacement:
            raise ConfigError(
                "the train loader draws samples by weights or with replacement, but with tokenizer= every row is taken once an "
                "epoch, in batches of similar length: leave out the sampler or tokenizer="
            )
        return make_token_loader(
            self.rows(dataset, name=name),
            pad_id=padding_id(self._tokenizer),
            batch_size=settings.batch_size,
            # Lightning takes the shuffling out of ordinary loaders itself where it trains on the same few batches.
            shuffle=settings.shuffle and not facts.overfits,
            drop_last=settings.drop_last,
            seed=self.seed,
            packing=self.config.pack_rows and settings.shuffle,
            collator=None if settings.collate_fn is default_collate else settings.collate_fn,
            num_workers=0 if settings.num_workers == "auto" else settings.num_workers,
            pin_memory=facts.on_cuda if settings.pin_memory == "auto" else settings.pin_memory,
        )

    def for_report(self, dataset: Any, settings: LoaderSettings) -> LoaderSettings:
        """Return settings in which an epoch has as many samples as there are rows, or sequences that rows are packed into."""
        rows = self.rows(dataset)
        return replace(settings, num_draws=len(PackedRows(rows) if self.config.pack_rows else rows))


def _by_position(dataset: Any) -> Any:
    """Return a dataset that has positions; the rows of a stream are read into a list."""
    return dataset if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") else list(dataset)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of the dataset in front of the message of any `SourceError` that leaves the block."""
    try:
        yield
    except SourceError as error:
        if name:
            raise SourceError(f"{name}: {error}") from error
        raise
