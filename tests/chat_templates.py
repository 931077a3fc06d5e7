"""Chat templates in the style of common ones, written for these tests, and tokenizers that know their special tokens."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# every message between two markers, its role first
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# headers around the role, contents trimmed
LLAMA3 = """\
{{- '<s>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# reasoning is kept after the last question alone; tools, calls and their results
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# the same, but the model is always asked to think: the heading of an answer has more than those of earlier answers
THINKING = QWEN3.replace(
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}",
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}",
)
# no header at all before an answer; the system's text stands in the last question; strict about the order of roles
MISTRAL = """\
{%- set ns = namespace(system='', last=-1, turn=0) %}
{%- if messages[0]['role'] == 'system' %}{%- set ns.system = messages[0]['content'] %}{%- endif %}
{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- '<s>' }}
{%- for m in messages %}
    {%- if m['role'] == 'user' or (m['role'] == 'assistant' and not m.tool_calls) %}
        {%- if (m['role'] == 'user') != (ns.turn % 2 == 0) %}
            {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
        {%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {%- if tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (ns.system + '\n\n' if ns.system and loop.index0 == ns.last else '') + m['content'] + '[/INST]' }}
    {%- elif m['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}
    {%- elif m['role'] == 'assistant' and m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}{{- (call.function | tojson) + (', ' if not loop.last else '') }}{%- endfor %}
        {{- ']</s>' }}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' + m['content'] | trim + '</s>' }}
    {%- endif %}
{%- endfor %}
"""
# what the assistant writes is marked by the template itself
MARKED = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{% generation %}
{{- message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# no special token anywhere: words name the roles
PLAIN = (
    "{% for message in messages %}{{ '### ' + message.role + ':\n' + message.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# the end of a text follows where the template does not ask for an answer
CLOSED = CHATML.replace("{% endif %}", "{% else %}{{ '</s>' }}{% endif %}")
# the last answer of a conversation ends otherwise than earlier ones, unless the template asks for another
RETURNED = CHATML.replace(
    "'<|im_end|>' + '\n'", "('</s>' if loop.last and not add_generation_prompt else '<|im_end|>')"
)
# an answer without reasoning has empty marks of reasoning in front, and the model is asked to think
UNTHINKING = CHATML.replace(
    "message.content +", "('<think></think>' if message.role == 'assistant' else '') + message.content +"
).replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
# no heading is asked for behind an answer, but one is written
UNASKED = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '\nassistant:' }}{% endif %}"
)
TEMPLATES = {
    "closed": CLOSED,
    "returned": RETURNED,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "thinking": THINKING,
    "mistral": MISTRAL,
    "marked": MARKED,
    "plain": PLAIN,
}
# what ends a turn in each of them
ENDINGS = {
    "closed": "</s>",
    "returned": "</s>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "thinking": "<|im_end|>",
    "mistral": "</s>",
    "marked": "<|im_end|>",
    "plain": "",
}
SPECIAL = [
    *("<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]


@cache
def chat_tokenizer(name, *, template=None):
    """Byte pairs learned on a few sentences, with the special tokens of all templates; the end of a turn ends a text."""
    model = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.decoder = decoders.ByteLevel()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.train_from_iterator(["assistant\nThe answer is\n\nThe", "user\nThe question\n\n### user:\n"] * 20, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=ENDINGS[name] or "</s>",
        additional_special_tokens=SPECIAL[4:],
    )
    made.chat_template = template or TEMPLATES[name]
    return made
