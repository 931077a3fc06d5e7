"""Instruction data through the data module: rows in, batches of tokens out."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dq_lightning import QuantizeConfig, QuantizedDataModule
from dq_lightning.core.config import BinConfig, FeatureConfig, TextConfig
from dq_lightning.core.errors import ConfigError, DQError, SourceError
from dq_lightning.tokens.rows import IGNORED
from tests.chat_templates import CHATML, chat_tokenizer
from tests.lightning_scripts.common import photos, trainer
from tests.small_tokenizers import byte_tokenizer

COUNT = 60


def rows(count=COUNT):
    return [
        {"id": i, "instruction": f"Name number {i}", "input": "", "output": f"It is {i}." + " Yes." * (i % 9)}
        for i in range(count)
    ]


def vectors(count=COUNT):
    return np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)


def module(data=None, **options):
    return QuantizedDataModule(
        rows() if data is None else data,
        **{"encoder": vectors(), "keep_ratio": 0.5, "tokenizer": byte_tokenizer(), "batch_size": 4} | options,
    )


def opened(data_module):
    data_module.prepare_data()
    data_module.setup("fit")
    return data_module


def texts(batch):
    """What each row of a batch asks and answers."""
    tokenizer = byte_tokenizer()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != IGNORED
        yield tokenizer.decode(ids[: int(learned.nonzero()[0])]), tokenizer.decode(labels[learned])


class Writer(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(byte_tokenizer()),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
        self.sizes = []
        self.validated = 0

    def training_step(self, batch, _):
        self.sizes.append(len(batch["input_ids"]))
        return self.network(**batch).loss

    def validation_step(self, batch, _):
        self.validated += len(batch["input_ids"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize("kind", ["list", "hub", "file"])
@pytest.mark.parametrize("store", ["indices", "packed"])
def test_every_row_of_the_selection_comes_once_an_epoch(kind, store, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows()))
    data = {"list": rows(), "hub": Dataset.from_list(rows()), "file": str(path)}[kind]
    made = opened(module(data, store=store))
    answers = [answer for batch in made.train_dataloader() for _, answer in texts(batch)]
    wanted = [rows()[i]["output"] + "</s>" for i in made.selection.index.tolist()]
    assert sorted(answers) == sorted(wanted)
    asked = {question for batch in made.train_dataloader() for question, _ in texts(batch)}
    assert all("### Response:" in question for question in asked)


def test_fit_with_validation_rows_and_packing():
    for packed in (False, True):
        config = QuantizeConfig(text=TextConfig(train_length=1024, pack_rows=packed))
        model = Writer()
        made = module(config=config, val=rows(10), eval_batch_size=5)
        trainer(max_epochs=2).fit(model, made)
        assert model.validated >= 20
        if packed:
            assert len(model.sizes) < 2 * 8
        else:
            assert sum(model.sizes) == 2 * 30


def test_a_collate_function_gets_token_items():
    seen = []

    def collate(items):
        seen.extend(items)
        return len(items)

    made = opened(module(collate_fn=collate))
    assert sum(made.train_dataloader()) == 30
    assert all(item.keys() == {"input_ids", "labels"} for item in seen)


def test_without_a_tokenizer_rows_come_as_they_are():
    made = opened(module(tokenizer=None, collate_fn=list))
    delivered = [row for batch in made.train_dataloader() for row in batch]
    assert sorted(row["id"] for row in delivered) == made.selection.index.tolist()
    assert all(row == rows()[row["id"]] for row in delivered)


def test_from_a_store_alone(tmp_path):
    made = opened(module(store="packed"))
    alone = QuantizedDataModule.from_store(made.info.path, tokenizer=byte_tokenizer(), cache_dir=tmp_path)
    answers = sorted(answer for batch in opened(alone).train_dataloader() for _, answer in texts(batch))
    assert answers == sorted(rows()[i]["output"] + "</s>" for i in made.selection.index.tolist())


def test_a_wrapped_module_of_rows():
    class Rows(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(rows(), batch_size=3, shuffle=True)

    made = QuantizedDataModule.from_datamodule(Rows(), encoder=vectors(), keep_ratio=0.5, tokenizer=byte_tokenizer())
    sizes = [len(batch["input_ids"]) for batch in opened(made).train_dataloader()]
    assert sizes == [3] * 10


def test_images_have_no_tokens():
    made = QuantizedDataModule(photos(40), keep_ratio=0.5, num_bins=2, tokenizer=byte_tokenizer())
    with pytest.raises(DQError, match=r"columns|rows"):
        opened(made).train_dataloader()


def test_patches_of_text_are_refused():
    with pytest.raises(ConfigError, match="patches of images"):
        opened(module(drop_ratio=0.2))


def test_whitening_changes_the_bins_and_their_key():
    plain, white = (
        opened(module(config=QuantizeConfig(features=FeatureConfig(whiten=flag)))) for flag in (False, True)
    )
    assert plain.info.path != white.info.path
    assert plain.bins.assignment.tolist() != white.bins.assignment.tolist()


def test_near_duplicates_are_never_selected():
    doubled = np.concatenate([vectors(30), vectors(30) * 2])
    made = opened(module(encoder=doubled, keep_ratio=0.25, config=QuantizeConfig(bins=BinConfig(deduplicate=0.999))))
    assert len(made.selection) == 15
    assert int(made.selection.index.max()) < 30
    assert (made.bins.assignment[30:] == -1).all()
    with pytest.raises(ConfigError, match="near-duplicates"):
        opened(module(encoder=doubled, keep_ratio=0.75, config=QuantizeConfig(bins=BinConfig(deduplicate=0.999))))


# conversations whose template may refuse a row

STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML


def chats(refused=()):
    return [
        {
            "messages": [{"role": "system", "content": "s"}] * (i in refused)
            + [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}."}]
        }
        for i in range(COUNT)
    ]


def chat_module(data, **options):
    return module(data, **{"tokenizer": chat_tokenizer("chatml", template=STRICT)} | options)


def test_a_row_that_the_chat_template_refuses_is_told_before_the_work(tmp_path):
    made = chat_module(chats(refused=[41]), cache_dir=tmp_path)
    with pytest.raises(SourceError, match=r"^row 41: .*begin with the user.*config.text.use_chat_template"):
        made.prepare_data()
    assert not list(tmp_path.glob("1-features/*"))
    made = chat_module(chats(), val=chats(refused=[3]), cache_dir=tmp_path)
    with pytest.raises(SourceError, match=r"^val=: row 3: "):
        made.prepare_data()
    assert not list(tmp_path.glob("1-features/*"))


def test_a_row_of_a_set_that_was_made_before_is_named_by_its_position_in_the_data(tmp_path):
    for store in ("indices", "packed"):
        kept = opened(chat_module(chats(), tokenizer=None, store=store, cache_dir=tmp_path)).selection.index.tolist()
        bad = kept[-1]
        data = chats(refused=[bad])
        made = opened(chat_module(data, tokenizer=None, store=store, cache_dir=tmp_path))
        assert made.selection.index.tolist() == kept
        with pytest.raises(SourceError, match=rf"^row {bad}: .*begin with the user"):
            opened(chat_module(data, store=store, cache_dir=tmp_path))
    alone = QuantizedDataModule.from_store(
        made.info.path, tokenizer=chat_tokenizer("chatml", template=STRICT), cache_dir=tmp_path
    )
    with pytest.raises(SourceError, match=rf"^row {bad}: "):
        opened(alone)


def test_rows_that_the_chat_template_refuses_are_left_out_on_request(caplog):
    refused = list(range(0, COUNT, 2))
    made = opened(chat_module(chats(refused), on_error="skip"))
    kept = [i for i in made.selection.index.tolist() if i not in refused]
    tokenizer = chat_tokenizer("chatml")
    answers = sorted(
        tokenizer.decode(labels[labels != IGNORED]) for batch in made.train_dataloader() for labels in batch["labels"]
    )
    assert answers == sorted(f"a{i}.<|im_end|>" for i in kept)
    assert f"{30 - len(kept)} rows can't be written as text" in caplog.text


def test_the_chat_template_can_be_left_aside_and_used_for_all_rows():
    tokenizer = chat_tokenizer("chatml", template=STRICT)
    for data, flag, said in ((chats(refused=[1]), False, "user: q"), (rows(), True, "<|im_start|>user\nName number")):
        made = opened(chat_module(data, config=QuantizeConfig(text=TextConfig(use_chat_template=flag))))
        (batch, *_) = made.train_dataloader()
        assert said in tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("kind", ["list", "hub", "map"])
def test_a_first_row_without_input_hides_no_other(kind):
    class Map:
        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            return data[index]

    data = [row | ({"input": f"see {row['id']}"} if row["id"] % 2 else {}) for row in rows()]
    data = [{name: cell for name, cell in row.items() if cell} for row in data]
    given = {"list": data, "hub": Dataset.from_list(data[::-1]), "map": Map()}[kind]
    config = QuantizeConfig(text=TextConfig(template="alpaca"))
    made = opened(module(given, config=config, keep_ratio=1.0))
    asked = [question for batch in made.train_dataloader() for question, _ in texts(batch)]
    assert sum("### Input:\nsee " in question for question in asked) == COUNT / 2


def test_the_same_batches_in_every_epoch_where_a_run_overfits():
    class Remembers(Writer):
        def __init__(self):
            super().__init__()
            self.epochs = {}

        def training_step(self, batch, index):
            self.epochs.setdefault(self.current_epoch, []).append(batch["input_ids"].tolist())
            return super().training_step(batch, index)

    for packed in (False, True):
        model = Remembers()
        config = QuantizeConfig(text=TextConfig(pack_rows=packed))
        trainer(max_epochs=3, overfit_batches=2).fit(model, module(config=config, batch_size=5))
        assert len(model.epochs) == 3
        assert model.epochs[0] == model.epochs[1] == model.epochs[2]


def test_validation_rows_of_a_stream_are_tokenized():
    stream = Dataset.from_list(rows(10)).to_iterable_dataset()
    made = opened(module(val=stream, eval_batch_size=4))
    batches = list(made.val_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    assert [answer for batch in batches for _, answer in texts(batch)] == [row["output"] + "</s>" for row in rows(10)]
    with pytest.raises(SourceError, match="val=: the columns are 'other'"):
        opened(module(val=Dataset.from_list([{"other": "a"}] * 3).to_iterable_dataset())).val_dataloader()


def test_the_splits_of_a_dict_of_streams():
    splits = {name: Dataset.from_list(rows(n)).to_iterable_dataset() for name, n in (("train", 60), ("validation", 9))}
    made = opened(module(IterableDatasetDict(splits)))
    assert sum(len(batch["input_ids"]) for batch in made.val_dataloader()) == 9
