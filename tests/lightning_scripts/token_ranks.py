"""Two processes train on token batches. Each writes the rows it saw, epoch by epoch, to FOLDER/report-RANK.json."""

import json
import sys
from pathlib import Path

import lightning as L
import torch

from dq_lightning.tokens.batches import make_token_loader
from dq_lightning.tokens.rows import encode_rows
from tests.lightning_scripts.common import trainer
from tests.small_tokenizers import word_tokenizer


class Seeing(L.LightningModule):
    """Remembers the first row number and length of every batch; the row's number is written in its words."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Embedding(20, 1)
        self.epochs: list[list[dict]] = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, _):
        assert {name: x.dtype for name, x in batch.items() if name != "attention_mask"} == dict.fromkeys(
            [name for name in batch if name != "attention_mask"], torch.int64
        )
        ids = [[i - 7 for i in row.tolist() if 7 <= i <= 10] for row in batch["input_ids"]]
        self.epochs[-1].append({"rows": [number_in(digits) for digits in ids], "length": batch["input_ids"].shape[1]})
        return self.layer(batch["input_ids"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def row(number):
    """The number in base 4, four words; then words that say nothing, for the length."""
    digits = [["one", "two", "three", "four"][number // 4**place % 4] for place in range(4)]
    return {"prompt": "ask ", "completion": " ".join([*digits, *["say"] * (number * 37 % 50)])}


def number_in(digits):
    return sum(digit * 4**place for place, digit in enumerate(digits[:4]))


class Rows(L.LightningDataModule):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        rows = encode_rows([row(n) for n in range(self.count)], word_tokenizer(), max_length=64)
        return make_token_loader(rows, pad_id=0, batch_size=4, seed=1)


def main(folder):
    report = {}
    for count in (200, 37):
        for attempt in (0, 1):
            model = Seeing()
            torch.manual_seed(attempt)
            running = trainer(devices=2, strategy="ddp", max_epochs=3)
            running.fit(model, Rows(count))
            report[f"{count} rows, attempt {attempt}"] = model.epochs
    (folder / f"report-{running.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
