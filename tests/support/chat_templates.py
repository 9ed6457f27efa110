# ruff: noqa: E501  (a template is one text)
"""Chat templates that behave as those of public models do for plain conversations (without tools), in jinja."""

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: name -> (template, bos, eos, other special tokens)
FAMILIES = {
    # Qwen2 and SmolLM2 put a system text of their own where none is given
    "qwen2": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML,
        None,
        "<|im_end|>",
        ["<|im_start|>", "<|endoftext|>"],
    ),
    # Qwen3 drops the thoughts of earlier answers and starts the last answer of a finished conversation with empty ones
    "qwen3": (
        "{% set ns = namespace(last=0) %}"
        "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}"
        "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
        "<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        None,
        "<|im_end|>",
        ["<|im_start|>", "<|endoftext|>"],
    ),
    # Llama 2 puts the system text into the first question, and strips
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
        "{% for message in turns %}" + _ALTERNATE + "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        [],
    ),
    "llama3": (
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        [],
    ),
    # later Mistral templates put the system text before the last question: such a system turn is not supported
    "mistral-v3": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}" + _ALTERNATE +
        "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        ["[INST]", "[/INST]"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + _ALTERNATE +
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos>",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = 'A chat between a curious user and an assistant.' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token + system }}{% for message in turns %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ ' USER: ' + message['content'].strip() }}{% else %}"
        "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        "<s>",
        "</s>",
        [],
    ),
}  # fmt: skip


def renderer(template, bos=None, eos=None):
    """A function that renders messages by `transformers`, with the prompt for an answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}

    def render(messages):
        return render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)[0][0]

    return render
