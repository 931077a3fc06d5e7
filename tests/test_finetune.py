"""The example of fine-tuning runs at a small size, and what it writes loads; the benchmark of text prints its tables."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small_tokenizers import byte_tokenizer
from tests.test_examples import EXAMPLES, run

ROWS = [
    {"instruction": f"Repeat the word {word}.", "input": "", "output": f"{word} {word}"}
    for word in ("tree", "house", "river", "stone", "cloud")
    for _ in range(8)
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A Llama of two layers that knows nothing, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def example():
    spec = importlib.util.spec_from_file_location("finetune_alpaca", EXAMPLES / "finetune_alpaca.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_finetune_lowers_the_loss_and_saves_a_model(small_model, tmp_path, packing):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [row | {"output": f"{row['output']} {n}"} for n, row in enumerate(ROWS)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    np.save(tmp_path / "rows.npy", np.arange(0, 40, 2))
    tuned = tmp_path / "tuned"
    printed = run(
        "finetune_alpaca.py", "--model", str(small_model), "--data", str(tmp_path / "data.json"),
        "--rows", str(tmp_path / "rows.npy"), "--output", str(tuned), "--held-out", "6", "--epochs", "4",
        "--accumulate", "1", "--learning-rate", "1e-2", "--precision", "32-true", "--accelerator", "cpu", "--quiet",
        *(["--packing"] if packing else []), cwd=tmp_path,
    )  # fmt: skip
    assert "20 training rows, 6 held out" in printed
    before, after = (
        float(printed.split("per token: ")[1].split(mark)[0].split()[-1]) for mark in (" before", " after")
    )
    assert after < before - 0.5
    assert f"lm_eval --model hf --model_args pretrained={tuned}" in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), AutoTokenizer.from_pretrained(tuned)
    start = AutoModelForCausalLM.from_pretrained(small_model)
    assert not torch.equal(model.model.norm.weight, start.model.norm.weight)
    assert model.config.use_cache
    ids = tokenizer("Repeat the word tree.", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_finetune_goes_on_from_its_last_checkpoint(small_model, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([row | {"input": str(n)} for n, row in enumerate(ROWS)]))
    arguments = [
        "--model", str(small_model), "--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "tuned"),
        "--held-out-data", str(tmp_path / "held.json"), "--held-out", "2", "--accumulate", "1", "--save-steps", "5",
        "--precision", "32-true", "--accelerator", "cpu", "--quiet", "--max-length", "64",
    ]  # fmt: skip
    (tmp_path / "held.json").write_text(json.dumps([ROWS[0], ROWS[8]]))
    run("finetune_alpaca.py", *arguments, "--epochs", "1", cwd=tmp_path)
    saved = tmp_path / "tuned" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 10
    printed = run("finetune_alpaca.py", *arguments, "--epochs", "2", "--resume", cwd=tmp_path)
    assert torch.load(saved, weights_only=True)["global_step"] == 20
    assert "after 20 steps" in printed


def test_held_out_rows_are_never_trained_on(tmp_path):
    module = example()
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    # rows 0 to 7 are copies of one another: none of them may be held out
    np.save(tmp_path / "rows.npy", np.array([0, 8, 16]))
    args = _arguments(tmp_path)
    data = module.make_data(byte_tokenizer(), args)
    seen = {tuple(data.train[i]["input_ids"].tolist()) for i in range(len(data.train))}
    held_out = [tuple(data.held_out[i]["input_ids"].tolist()) for i in range(len(data.held_out))]
    assert len(held_out) == 16
    assert not seen & set(held_out)
    args.rows = None
    with pytest.raises(SystemExit, match="all rows are in the training set"):
        module.make_data(byte_tokenizer(), args)


def test_the_whole_flow_holds_rows_out_before_it_quantizes(tmp_path):
    rows = [row | {"output": f"{row['output']} {n}"} for n, row in enumerate(ROWS)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32))
    args = _arguments(tmp_path)
    args.keep_ratio, args.held_out, args.encoder, args.rows = 0.5, 8, str(tmp_path / "vectors.npy"), None
    data = example().make_data(byte_tokenizer(), args)
    data.prepare_data()
    data.setup("fit")

    def sentences(loader):
        return {
            tuple(ids[mask.bool()].tolist())
            for b in loader
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        }

    trained, held_out = sentences(data.train_dataloader()), sentences(data.val_dataloader())
    assert (len(trained), len(held_out)) == (16, 8)
    assert not trained & held_out


def test_recipe_and_sharding(small_model, monkeypatch):
    module = example()
    command = ["finetune_alpaca.py", "--model", str(small_model), "--data", "x", "--output", "y", "--strategy", "fsdp"]
    monkeypatch.setattr("sys.argv", command)
    args = module.parse()
    assert (args.epochs, args.batch_size, args.accumulate, args.learning_rate) == (9, 4, 4, 8e-6)
    assert (args.weight_decay, args.precision) == (0.1, "bf16-mixed")
    tuner = module.FineTuner(args.model, args.learning_rate, args.weight_decay)
    assert [kind.__name__ for kind in module.decoder_layers(tuner.network)] == ["LlamaDecoderLayer"]
    strategy = module.make_strategy(args, tuner.network)
    policy = strategy.kwargs["auto_wrap_policy"]
    wrapped = [name for name, part in tuner.named_modules() if policy(module=part, recurse=False, nonwrapped_numel=0)]
    assert wrapped == ["network.model.layers.0", "network.model.layers.1"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_are_float32_with_dropout_whatever_the_checkpoint_is_stored_in(small_model, tmp_path, stored):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(small_model, dtype=stored).save_pretrained(tmp_path / "half")
    tuner = example().FineTuner(str(tmp_path / "half"), 8e-6, 0.1)
    assert {parameter.dtype for parameter in tuner.parameters()} == {torch.float32}
    assert all(part.training for part in tuner.modules())
    weight = tuner.network.model.norm.weight
    before = weight.detach().clone()
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    tuner.network(**batch).loss.backward()
    torch.optim.AdamW(tuner.parameters(), 8e-6).step()
    # a step of the published size; in bfloat16 it is smaller than half a unit in the last place of 1
    assert 0 < (weight - before).abs().max() < 1e-4


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(small_model, capsys):
    module, size = example(), len(byte_tokenizer())
    assert module.FineTuner(str(small_model), 1e-3, 0.1, size).network.get_input_embeddings().num_embeddings == size
    tuner = module.FineTuner(str(small_model), 1e-3, 0.1, size + 3)
    assert "new rows" in capsys.readouterr().out
    batch = {"input_ids": torch.tensor([[1, size + 2]]), "labels": torch.tensor([[1, size + 2]])}
    assert tuner.network(**batch).loss.isfinite()


def test_a_loss_that_is_lost_stops_and_saves_nothing(small_model, tmp_path, monkeypatch):
    module = example()
    (tmp_path / "data.json").write_text(json.dumps([row | {"output": f"{n}"} for n, row in enumerate(ROWS)]))
    np.save(tmp_path / "rows.npy", np.arange(20))
    command = [
        "finetune_alpaca.py", "--model", str(small_model), "--data", str(tmp_path / "data.json"), "--rows",
        str(tmp_path / "rows.npy"), "--output", str(tmp_path / "out"), "--held-out", "4", "--epochs", "1", "--accumulate", "1",
        "--precision", "32-true", "--accelerator", "cpu", "--quiet", "--learning-rate", "1e30",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"nothing is saved: lower --learning-rate"):
        module.main()
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_rows_of_every_kind_of_file(tmp_path):
    import lzma

    module = example()
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(json.dumps(ROWS).encode()))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    for name in ("a.json", "a.jsonl", "a.json.xz", "bom.json", "lines.json"):
        assert module.read_rows(tmp_path / name) == ROWS


def test_benchmark_of_text(tmp_path):
    rows = [row | {"output": f"{row['output']} {n}"} for n, row in enumerate(ROWS * 30)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(size=(1200, 8)).astype(np.float32))
    name = str(Path("..") / "benchmarks" / "text.py")
    files = ("--alpaca-json", str(tmp_path / "data.json"), "--embeddings", str(tmp_path / "embeddings.npy"))
    printed = run(name, *files, cwd=tmp_path)
    assert "| 1,200 | 120 |" in printed
    for ratio, count in (("1%", 12), ("10%", 120)):
        for way in ("DQ", "random", "longest", "kmeans"):
            assert f"| {ratio} | {way} | {count} |" in printed


def _arguments(folder):
    from argparse import Namespace

    return Namespace(
        data=folder / "data.json", rows=folder / "rows.npy", held_out=500, held_out_data=None, max_length=256,
        batch_size=4, eval_batch_size=2, seed=0, packing=False, keep_ratio=None, encoder="auto",
    )  # fmt: skip
