"""Small tokenizers built in the test: one token a word, and byte pairs learned on a few sentences."""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "ask",
    "context",
    "say",
    "one",
    "two",
    "three",
    "four",
    "\n",
    "<|user|>",
    "<|bot|>",
]
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def word_tokenizer(*, begins=True, chat_template=None):
    """One id a word, its place in WORDS; spaces vanish. With `begins` every text starts with <s>."""
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r" +"), "removed")
    if begins:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=["<|user|>", "<|bot|>"], **SPECIAL)
    made.chat_template = chat_template
    return made


@cache
def byte_tokenizer(ends=False):
    """Byte pairs without a word boundary, so that tokens would span the end of a prompt. `ends` adds </s> to every text."""
    model = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.decoder = decoders.ByteLevel()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.train_from_iterator(["### Response:The answer is:The", "ask:The question:The"] * 20, trainer)
    if ends:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            special_tokens=[("<s>", model.token_to_id("<s>")), ("</s>", model.token_to_id("</s>"))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)
