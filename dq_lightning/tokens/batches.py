"""Encoded rows to batches that causal language models of transformers take: padded, or several rows in one sequence."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from dq_lightning.core.errors import ConfigError
from dq_lightning.tokens.rows import IGNORED, TokenRows
from dq_lightning.tokens.sampler import EpochShuffle, LengthBatchSampler

# `"mask"` works with every attention; `"positions"` is for flash attention, which takes no mask and reads the positions
PackedAttention = Literal["mask", "positions"]


class PackedRows(Dataset[dict[str, Tensor]]):
    """Several rows in one sequence of at most `capacity` tokens; rows are never split.

    Item i has `input_ids`, `labels`, `position_ids` (from 0 in every row) and `rows` (number of the row that a token belongs
    to), int64 [length]. No row learns its first token: its prediction would come from the row before.

    Args:
        rows: encoded.
        capacity: tokens of a sequence at most; the rows' `max_length` when None.

    Attributes:
        packs: which rows each sequence holds.
        lengths: int64 [number of sequences].
    """

    def __init__(self, rows: TokenRows, capacity: int | None = None) -> None:
        self.rows = rows
        capacity = rows.report.max_length if capacity is None else capacity
        if len(rows) and (longest := int(rows.lengths.max())) > capacity:
            row = int(rows.positions[int(rows.lengths.argmax())])
            raise ConfigError(f"row {row} has {longest} tokens, a packed sequence {capacity}: lower max_length")
        self.packs = pack(rows.lengths.tolist(), capacity)
        self.lengths = torch.tensor([int(rows.lengths[members].sum()) for members in self.packs], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        items = [self.rows[row] for row in self.packs[index]]
        sizes = [len(item["input_ids"]) for item in items]
        labels = torch.cat([item["labels"] for item in items])
        labels[[sum(sizes[:n]) for n in range(len(sizes))]] = IGNORED
        return {
            "input_ids": torch.cat([item["input_ids"] for item in items]),
            "labels": labels,
            "position_ids": torch.cat([torch.arange(size) for size in sizes]),
            "rows": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        }


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows go into one sequence: best-fit decreasing, ties in the order of the rows.

    Args:
        lengths: tokens of every row.
        capacity: tokens of a sequence at most.

    Returns:
        Positions in `lengths`, each once; those of a sequence add up to at most `capacity`.

    Raises:
        ConfigError: a row is longer than that.

    Complexity: O(n log n + n S), S the number of open sequences; the second term moves machine words only.
    """
    packs: list[list[int]] = []
    # (room left, number of the pack), ascending
    room: list[tuple[int, int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[row] > capacity:
            raise ConfigError(f"row {row} has {lengths[row]} tokens, a packed sequence {capacity}: lower max_length")
        place = bisect.bisect_left(room, (lengths[row], -1))
        if place == len(room):
            packs.append([row])
            left, number = capacity - lengths[row], len(packs) - 1
        else:
            left, number = room.pop(place)
            packs[number].append(row)
            left -= lengths[row]
        bisect.insort(room, (left, number))
    return packs


@dataclass(frozen=True)
class TokenCollator:
    """Makes a batch of items of `TokenRows` or `PackedRows`, filled on the right up to the longest.

    A batch of B rows has `input_ids`, `labels` (-100 where filled) and `attention_mask`, all int64 [B, L]. Packed rows have
    `position_ids` int64 [B, L] besides, and their `attention_mask` is float32 [B, 1, L, L]: 0 where a token sees another,
    the least float where not, which all but flash attention add to their scores; with `attention="positions"` there is
    none.

    Attributes:
        pad_id: token to fill with.
        multiple_of: make lengths multiples of this, as tensor cores like them.
        attention: how packed rows are kept apart.
    """

    pad_id: int
    multiple_of: int = 1
    attention: PackedAttention = "mask"

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        longest += -longest % self.multiple_of
        batch = {
            "input_ids": self._stack(items, "input_ids", longest, self.pad_id),
            "labels": self._stack(items, "labels", longest, IGNORED),
        }
        if "rows" not in items[0]:
            sizes = torch.tensor([len(item["input_ids"]) for item in items])
            return batch | {"attention_mask": (torch.arange(longest) < sizes[:, None]).long()}
        # what is filled counts from 0 again: a row of its own, which nothing else sees
        batch["position_ids"] = torch.stack(
            [torch.cat([item["position_ids"], torch.arange(longest - len(item["position_ids"]))]) for item in items]
        )
        if self.attention == "mask":
            batch["attention_mask"] = block_mask(self._stack(items, "rows", longest, -1))
        return batch

    @staticmethod
    def _stack(items: list[dict[str, Tensor]], name: str, longest: int, value: int) -> Tensor:
        return torch.stack([pad(item[name], (0, longest - len(item[name])), value=value) for item in items])


def block_mask(rows: Tensor) -> Tensor:
    """Additive causal mask, float32 [B, 1, L, L], under which a token sees itself and earlier tokens of its row.

    Args:
        rows: int64 [B, L], the row of every token.
    """
    seen = (rows[:, :, None] == rows[:, None, :]).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def make_token_loader(
    rows: TokenRows,
    *,
    pad_id: int,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    packing: bool = False,
    capacity: int | None = None,
    collator: Callable[[list[dict[str, Tensor]]], Any] | None = None,
    **settings: Any,
) -> DataLoader[dict[str, Tensor]]:
    """A loader of padded or packed batches. For DDP make it inside `train_dataloader`, where Lightning looks at it.

    Args:
        rows: encoded.
        pad_id: see `padding_id`.
        batch_size: rows, or packed sequences, of a batch.
        shuffle: batches of similar length in a new order every epoch; else the rows in order.
        drop_last: leave out the last, smaller batch.
        seed: of the order.
        packing: put several rows into one sequence.
        capacity: tokens of such a sequence; the longest row when None.
        collator: in place of `TokenCollator(pad_id)`.
        settings: further ones of `DataLoader`. Workers are seldom worth it: the rows are encoded already.
    """
    data = PackedRows(rows, capacity) if packing else rows
    collate = TokenCollator(pad_id) if collator is None else collator
    if not shuffle:
        return DataLoader(data, batch_size, drop_last=drop_last, collate_fn=collate, **settings)
    sampler = LengthBatchSampler(EpochShuffle(len(data), seed), batch_size, drop_last, data.lengths, seed)
    return DataLoader(data, batch_sampler=sampler, collate_fn=collate, **settings)
