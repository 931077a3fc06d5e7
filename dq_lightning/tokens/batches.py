"""Makes batches for causal language models of transformers: padded rows, or several rows in one sequence."""

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

# How packed rows are kept apart: `"mask"` works with every attention; `"positions"` is for flash attention, which takes
# no mask and reads the position ids.
PackedAttention = Literal["mask", "positions"]


class PackedRows(Dataset[dict[str, Tensor]]):
    """Dataset of packed sequences: several rows in one sequence of at most `max_length` tokens; rows are never split.

    Item i has `input_ids`, `labels`, `position_ids` (which start at 0 in every row) and `rows` (number of the row
    inside the sequence that a token belongs to), all int64 [length]. The first token of every row has the label -100,
    since it would be predicted from the row before.

    Args:
        rows: encoded rows, none of which is longer than the `max_length` that they were encoded with.

    Attributes:
        packs: positions of the rows that each sequence holds.
        lengths: int64 [number of sequences], length of every sequence in tokens.
    """

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows
        self.packs = pack(rows.lengths.tolist(), rows.report.max_length)
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
    """Decide which rows go into one sequence, by best-fit decreasing; ties are broken by the order of the rows.

    Args:
        lengths: number of tokens of every row.
        capacity: maximum number of tokens of a sequence.

    Returns:
        Positions in `lengths` for every sequence, each position once; the lengths of a sequence add up to at most
        `capacity`.

    Raises:
        ConfigError: a row is longer than `capacity`.

    >>> pack([5, 3, 4, 2], capacity=7)
    [[0, 3], [2, 1]]

    Complexity: O(n log n + n S), S the number of open sequences; the second term moves machine words only.
    """
    packs: list[list[int]] = []
    # Pairs (tokens left, number of the sequence), ascending.
    open_packs: list[tuple[int, int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[row] > capacity:
            raise ConfigError(
                f"row {row} has {lengths[row]} tokens, but a packed sequence holds {capacity}, and rows are never split: lower "
                "max_length"
            )
        place = bisect.bisect_left(open_packs, (lengths[row], -1))
        if place == len(open_packs):
            packs.append([row])
            left, number = capacity - lengths[row], len(packs) - 1
        else:
            left, number = open_packs.pop(place)
            packs[number].append(row)
            left -= lengths[row]
        bisect.insort(open_packs, (left, number))
    return packs


@dataclass(frozen=True)
class TokenCollator:
    """Collate function for items of `TokenRows` or `PackedRows`, which pads them on the right to the longest one.

    A batch of B rows has `input_ids`, `labels` (-100 for padding) and `attention_mask`, all int64 [B, L]. Packed rows
    also have `position_ids`, int64 [B, L], and their `attention_mask` is an additive mask, float32 [B, 1, L, L]: 0
    where a token attends to another, the lowest float32 elsewhere. All kinds of attention but flash attention add it to
    their scores; with `attention="positions"` a packed batch has no mask.

    Attributes:
        pad_id: id of the padding token.
        multiple_of: pad L to a multiple of this number, which is faster on tensor cores.
        attention: how packed rows are kept apart: by a `"mask"` or by `"positions"` alone.
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
        # The positions of padding start at 0 again: padding is a row of its own, to which no other token attends.
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
    """Make an additive causal mask, under which a token attends to itself and to earlier tokens of its own row.

    Args:
        rows: int64 [B, L], number of the row that every token belongs to.

    Returns:
        Mask float32 [B, 1, L, L]: 0 where the second token is visible to the first, the lowest float32 elsewhere.
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
    collator: Callable[[list[dict[str, Tensor]]], Any] | None = None,
    **settings: Any,
) -> DataLoader[dict[str, Tensor]]:
    """Make a loader of padded or packed batches.

    For DDP call this inside `train_dataloader`, so that Lightning can replace the sampler.

    Args:
        rows: encoded rows.
        pad_id: id of the padding token, see `padding_id`.
        batch_size: number of rows, or of packed sequences, of a batch.
        shuffle: whether to form batches of similar length in a new order every epoch; otherwise the rows come in order.
        drop_last: whether to leave out the last batch if it is smaller.
        seed: seed of the order.
        packing: whether to put several rows into one sequence of at most the `max_length` of the rows.
        collator: collate function in place of `TokenCollator(pad_id)`.
        settings: further arguments of `DataLoader`. Worker processes are seldom useful, since the rows are encoded
            already.
    """
    data = PackedRows(rows) if packing else rows
    collate = TokenCollator(pad_id) if collator is None else collator
    if not shuffle:
        return DataLoader(data, batch_size, drop_last=drop_last, collate_fn=collate, **settings)
    sampler = LengthBatchSampler(EpochShuffle(len(data), seed), batch_size, drop_last, data.lengths, seed)
    return DataLoader(data, batch_sampler=sampler, collate_fn=collate, **settings)
