"""Loaders of token batches for a data module: rows are encoded once, and every later loader takes them as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, default_collate

from dq_lightning.core.config import OnError, TextConfig
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.loading.loaders import LoaderSettings
from dq_lightning.loading.trainer_facts import TrainerFacts
from dq_lightning.tokens.batches import PackedRows, make_token_loader
from dq_lightning.tokens.rows import TokenRows, check_rows, encode_rows
from dq_lightning.tokens.tokenizer import load_tokenizer, padding_id


class TokenLoading:
    """Encodes datasets of rows with one tokenizer.

    Args:
        tokenizer: of transformers, or its name or folder.
        config: `template`, `columns`, `use_chat_template`, `train_length` and `pack_rows` are used.
        seed: of the order.
        on_error: as in `encode_rows`.
    """

    def __init__(self, tokenizer: Any, config: TextConfig, seed: int, on_error: OnError = "raise") -> None:
        self.config, self.seed, self.on_error = config, seed, on_error
        self._tokenizer = load_tokenizer(tokenizer)
        # the dataset is held too, so that no other one can get its number
        self._encoded: dict[int, tuple[Any, TokenRows]] = {}

    def rows(self, dataset: Any, positions: Sequence[int] | None = None, name: str = "") -> TokenRows:
        """The rows of a dataset, encoded at the first call.

        Args:
            dataset: of rows.
            positions: of its rows in the data that they were taken from, for messages.
            name: of the dataset, likewise.
        """
        if id(dataset) not in self._encoded:
            config = self.config
            with _naming(name):
                rows = encode_rows(
                    dataset,
                    self._tokenizer,
                    max_length=config.train_length,
                    positions=positions,
                    on_error=self.on_error,
                    **self._reading(),
                )
            self._encoded[id(dataset)] = dataset, rows
        return self._encoded[id(dataset)][1]

    def check(self, dataset: Any, name: str = "") -> None:
        """Write every row of a dataset without encoding it.

        Raises:
            SourceError: a row cannot be written; with `on_error="skip"`, if none can.
        """
        with _naming(name):
            check_rows(dataset, self._tokenizer, on_error=self.on_error, **self._reading())

    def _reading(self) -> dict[str, Any]:
        config = self.config
        return {
            "template": config.template,
            "columns": config.columns,
            "use_chat_template": config.use_chat_template,
        }

    def num_sequences(self, dataset: Any) -> int:
        """Sequences of an epoch: rows, or what they are packed into."""
        rows = self.rows(dataset)
        return len(PackedRows(rows, self.config.train_length)) if self.config.pack_rows else len(rows)

    def report(self, dataset: Any) -> None:
        """Say how many tokens the rows have and what was cut."""
        get_logger().info(str(self.rows(dataset).report))

    def loader(self, dataset: Any, settings: LoaderSettings, facts: TrainerFacts, *, name: str = "") -> DataLoader[Any]:
        """Batches of similar length in a new order every epoch; in order without `shuffle`, and then never packed.

        Raises:
            ConfigError: the settings draw rows by weights.
        """
        if settings.weights is not None or settings.replacement:
            raise ConfigError(
                "a weighted sampler cannot be carried over to batches of tokens: leave it out, or tokenizer="
            )
        collate = None if settings.collate_fn in (None, default_collate) else settings.collate_fn
        own = {
            "num_workers": 0 if settings.num_workers == "auto" else settings.num_workers,
            "pin_memory": facts.on_cuda if settings.pin_memory == "auto" else settings.pin_memory,
        }
        return make_token_loader(
            self.rows(dataset, name=name),
            pad_id=padding_id(self._tokenizer),
            batch_size=settings.batch_size,
            shuffle=settings.shuffle,
            drop_last=settings.drop_last,
            seed=self.seed,
            packing=self.config.pack_rows and settings.shuffle,
            capacity=self.config.train_length,
            collator=collate,
            **own,
        )

    def for_report(self, dataset: Any, settings: LoaderSettings) -> LoaderSettings:
        """Settings under which an epoch is counted in sequences."""
        return replace(settings, num_draws=self.num_sequences(dataset))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which dataset a row that cannot be read belongs to."""
    try:
        yield
    except SourceError as error:
        if name:
            raise SourceError(f"{name}: {error}") from error
        raise
