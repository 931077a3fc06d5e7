"""Text through the very same stations: from rows to a compact set, indices or packed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import ConcatDataset, Subset

from dq_lightning.core.config import BinConfig, FeatureConfig, QuantizeConfig, SelectionConfig, TextConfig
from dq_lightning.core.errors import FeatureError, SourceError, StoreError
from dq_lightning.exports.command import export_set
from dq_lightning.pipeline.compact import open_compact, open_packed
from dq_lightning.pipeline.quantize import quantize
from dq_lightning.sources.jsonl import read_rows

WORDS = ["red", "blue", "tree", "house", "grün", "水", "run", "sleep"]
CONFIG = QuantizeConfig(bins=BinConfig(num_bins=3), selection=SelectionConfig(keep_ratio=0.4))


def rows(count=20):
    random = np.random.default_rng(0)
    made = [
        {
            "id": i,
            "instruction": " ".join(random.choice(WORDS, 3)),
            "input": "" if i % 3 else str(random.choice(WORDS)),
            "output": " ".join(random.choice(WORDS, 1 + i % 7)) * (1 if i != 5 else 500),
            "task": "colour" if i % 4 else "verb",
            "tags": [str(tag) for tag in random.choice(WORDS, i % 3)],
            "score": None if i % 5 else i / 7,
        }
        for i in range(count)
    ]
    if count > 7:
        made[7] = dict(made[6])
    return made


def vectors(count=20):
    return np.random.default_rng(1).normal(size=(count, 5)).astype(np.float32)


def kept(info):
    return open_compact(Path(info.path)).selection.index.tolist()


def run(data, config=CONFIG, encoder=None, **options):
    return quantize(data, config, encoder=vectors() if encoder is None else encoder, progress=False, **options)


def packed(config):
    return QuantizeConfig.from_dict(config.to_dict() | {"store": "packed"})


@pytest.mark.parametrize("kind", ["list", "hub", "file"])
def test_rows_come_out_of_a_packed_store_as_they_went_in(kind, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows()))
    data = {"list": rows(), "hub": Dataset.from_list(rows()), "file": path}[kind]
    info = run(data, packed(CONFIG))
    stored = open_packed(info.path)
    index = kept(info)
    assert info.num_samples == len(stored) == 8
    wanted = [rows()[i] for i in index]
    assert [stored[i] for i in range(len(stored))] == wanted
    assert [list(stored[i]) for i in range(len(stored))] == [list(row) for row in wanted]
    assert list(stored.ids) == [str(i) for i in index]


def test_groups_by_a_column_and_without():
    whole, grouped = run(rows()), run(rows(), labels="task")
    assert len(kept(whole)) == len(kept(grouped)) == 8
    verbs = sum(rows()[i]["task"] == "verb" for i in kept(grouped))
    assert verbs == round(0.4 * sum(row["task"] == "verb" for row in rows()))
    assert whole.num_classes is None


def test_the_second_run_finds_the_first_and_the_embeddings_count():
    first = run(rows())
    assert run(rows()).reused
    assert run(rows(), encoder=torch.from_numpy(vectors())).reused
    changed = vectors()
    changed[0] += 1
    assert not run(rows(), encoder=changed).reused
    other = rows()
    other[3]["output"] += "."
    assert not run(other).reused
    assert run(rows()).path == first.path


def test_the_template_counts_where_text_is_read_and_only_there(tmp_path):
    text = [{"text": row["output"], **row} for row in rows()]
    by_name = [
        QuantizeConfig(text=TextConfig(template=name), selection=CONFIG.selection) for name in ("alpaca", "plain")
    ]
    assert not run(text, by_name[0]).reused
    assert run(text, by_name[1]).reused  # ready-made embeddings read no text
    model = _tiny_model(tmp_path)
    paths = {run(text, config, encoder=str(model)).path for config in by_name}
    responses = QuantizeConfig(text=TextConfig(embed="response"), selection=CONFIG.selection)
    paths.add(run(text, responses, encoder=str(model)).path)
    pooled = QuantizeConfig(text=TextConfig(pooling="cls"), selection=CONFIG.selection)
    paths.add(run(text, pooled, encoder=str(model)).path)
    assert len(paths) == 4
    assert run(text, by_name[1], encoder=str(model)).reused


def _tiny_model(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_settings_from_json_name_the_embeddings(tmp_path):
    np.save(tmp_path / "made.npy", vectors())
    config = QuantizeConfig(features=FeatureConfig(encoder=str(tmp_path / "made.npy")), selection=CONFIG.selection)
    config = QuantizeConfig.from_json(config.to_json())
    assert quantize(rows(), config, progress=False).num_samples == 8


@pytest.mark.parametrize("store", ["indices", "packed"])
def test_half_a_character_is_told_before_the_work_or_left_out(store, tmp_path):
    halved = rows()
    halved[11]["output"] = "red \ud83d"
    model = str(_tiny_model(tmp_path / "model"))
    config = QuantizeConfig.from_dict(CONFIG.to_dict() | {"store": store})
    with pytest.raises(SourceError, match=r"row 11, column 'output'.*half of a character"):
        run(halved, config, encoder=model)
    info = run(halved, QuantizeConfig.from_dict(config.to_dict() | {"on_error": "skip"}), encoder=model)
    assert info.num_unreadable == 1
    assert 11 not in kept(info)
    # ready-made embeddings read no text: the row is kept and delivered as it is
    whole = run(halved, QuantizeConfig.from_dict(config.to_dict() | {"selection": {"keep_ratio": 1.0}}))
    delivered = open_packed(whole.path) if store == "packed" else halved
    assert delivered[11] == halved[11]
    data = None if store == "packed" else halved
    assert read_rows(export_set(whole.path, "json", str(tmp_path / "out.json"), dataset=data)) == halved


@pytest.mark.parametrize("kind", ["packed", "list", "subset", "concat"])
def test_text_sets_become_hugging_face_datasets(kind, tmp_path):
    made = [row | {"mixed": row["id"] if row["id"] % 2 else "two"} for row in rows()]
    data = {"subset": Subset(made, range(20)), "concat": ConcatDataset([made[:5], made[5:]])}.get(kind, made)
    info = run(data, packed(CONFIG) if kind == "packed" else CONFIG)
    export_set(info.path, "huggingface", str(tmp_path / "set"), dataset=None if kind == "packed" else data)
    assert load_from_disk(tmp_path / "set").to_list() == [made[i] for i in kept(info)]
    with pytest.raises(StoreError, match="json, huggingface or indices"):
        export_set(info.path, "parquet", str(tmp_path / "x"), dataset=None if kind == "packed" else data)


def test_a_wrong_number_of_embeddings_is_told():
    with pytest.raises(FeatureError, match=r"19 rows.*20 samples"):
        run(rows(), encoder=vectors(19))


def test_one_row():
    whole = QuantizeConfig(selection=SelectionConfig(keep_ratio=1.0))
    assert kept(run(rows(1), whole, encoder=vectors(1))) == [0]


@pytest.mark.slow
def test_a_tenth_of_all_real_rows(shared_dir, tmp_path):
    stored = np.load(shared_dir / "data" / "alpaca" / "minilm_embeddings_int8.npz")
    values = stored["q"].astype(np.float32) * stored["scale"][:, None]
    np.save(tmp_path / "made.npy", values / np.linalg.norm(values, axis=1, keepdims=True))
    code = (
        "import sys, json, resource; from dq_lightning.pipeline.quantize import quantize\n"
        "from dq_lightning.core.config import *\n"
        "config = QuantizeConfig(selection=SelectionConfig(keep_ratio=0.1), bins=BinConfig(num_bins=10),\n"
        "    features=FeatureConfig(encoder=sys.argv[2]))\n"
        "info = quantize(sys.argv[1], config, cache_dir=sys.argv[3], progress=False)\n"
        "print(json.dumps([info.num_samples, info.path, info.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    data = shared_dir / "data" / "alpaca" / "alpaca_data.json.xz"
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "made.npy"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, path, _, peak = json.loads(done.stdout)
    assert count == 5200
    assert peak * 1024 < 1.5e9
    assert np.bincount(open_compact(Path(path)).selection.bin).tolist() == [520] * 10
