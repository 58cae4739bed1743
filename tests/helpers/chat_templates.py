"""Chat templates in the shape of five families, written for these tests, and a tokenizer that knows their marks."""

from pathlib import Path

from helpers.data_helpers import make_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <s> </s> [INST] [/INST] <|user|> <|assistant|> <|system|> <|tool|> <|end|> "
    "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)

#: {family: (template, what ends an assistant's turn)}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "qwen3": (  # leaves the thinking of turns before the last question out, and writes tools and calls as JSON
        "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
        "{% endif %}{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last and (m.reasoning_content or loop.last) %}"
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content.strip() }}"
        "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "mistral": (
        "<s>{% set ns = namespace(first=true) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and ns.first %}{% set ns.first = false %}"
        "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' and m.tool_calls %}"
        "[TOOL_CALLS] {{ m.tool_calls | tojson }}</s>{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}",
        "</s>",
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "<|end|>",
    ),
    "marked": (  # with transformers' generation marks, as SmolLM3's
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
}


def make_chat_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A byte-level BPE that knows the marks of every template above."""
    texts = ["Hello there, how are you? I am fine. The answer is 42.\n\nassistant user system tool model"] * 20
    return make_tokenizer(folder, texts, vocab_size=360, special_tokens=SPECIAL_TOKENS.split(), template=template)
