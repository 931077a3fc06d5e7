"""A tiny text encoder on disk, as transformers and sentence-transformers lay it out."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]


def make_tokenizer(length=64):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=length,
    )  # fmt: skip


def make_model(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64,
        )  # fmt: skip
        return BertModel(config).eval()


def save_model(folder, seed=0, pooling=None, max_length=None, modules=(), prompts=None, **network):
    model = make_model(seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", *modules]
        listed = [
            {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
            for i, k in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if max_length is not None or network:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length} | network))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return model


def save_dense(folder, seed=3, width=16, out=6, activation="torch.nn.modules.activation.Tanh", **settings):
    """Files of a dense layer; returns its weight and bias."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        weight, bias = torch.randn(out, width), torch.randn(out)
    folder.mkdir(exist_ok=True)
    config = {"in_features": width, "out_features": out, "bias": True, "activation_function": activation}
    (folder / "config.json").write_text(json.dumps(config | settings))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    return weight, bias


class Texts:
    """The smallest source of text."""

    def __init__(self, texts):
        self.all = texts

    def __len__(self):
        return len(self.all)

    def texts(self, positions):
        return [self.all[position] for position in positions]
