"""Chat templates: messages to text, and messages to token ids that no message can forge.

`render_chat` renders a template as Hugging Face does, sandboxed and within a budget of work
(`sandbox.py`).

The one idea of `encode_chat`: the control tokens of the prompt (who speaks, where a turn ends)
must be those that the template writes, whatever the messages contain. It renders twice: once as
is, and once with unguessable marks inside every piece of a message that could spell a control
token, or a part of one. If both texts hold the same control tokens, the first is encoded as one
string, exactly as Hugging Face would. If not, the marked text is cut at its control tokens, which
can only be the template's; everything between is encoded as ordinary text, without the marks.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from rlm_jax.text import sandbox
from rlm_jax.text.tokenizer import Tokenizer, split_special

Message = Mapping[str, Any]
# Words that templates compare with or build control tokens from, as in "<|" + role + "|>".
KEYWORDS = frozenset(
    ("system", "user", "assistant", "tool", "developer", "function", "model", "ipython", "text")
)


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    bos_token: str = "",
    eos_token: str = "",
    **extra: Any,
) -> str:
    """Renders a chat template.

    Args:
        template: jinja2 source.
        messages: each with a "role" and whatever else the template reads ("content").
        add_generation_prompt: end with the opening of the assistant's turn.
        bos_token, eos_token: their texts.
        **extra: further variables of the template (`tools`, `documents`, ...).

    Raises:
        ValueError: a message is not a mapping with a role, or the template fails, refuses the
            messages, or is hostile.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is not a mapping with a 'role': {message!r:.80}")
    variables = {"tools": None, "documents": None} | extra
    variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    return sandbox.render(template, variables | {"bos_token": bos_token, "eos_token": eos_token})


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    **extra: Any,
) -> list[int]:
    """Token ids of a conversation; only the template's own control tokens become special ids.

    Where a message does contain the text of a control token, tests that the template makes on
    message texts do not see through the marks.

    Args:
        tokenizer: its `chat_template` is used unless `template` is given.
        messages, add_generation_prompt, **extra: as in `render_chat`.

    Raises:
        ValueError: there is no template, or `render_chat` raises it.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise ValueError("this tokenizer has no chat template; give one as template=")
    special = tokenizer.special_tokens
    text_of = {i: text for text, i in special.items()}
    known = {
        "add_generation_prompt": add_generation_prompt,
        "bos_token": "" if tokenizer.bos_id is None else text_of.get(tokenizer.bos_id, ""),
        "eos_token": text_of.get(tokenizer.eos_ids[0], "") if tokenizer.eos_ids else "",
    }
    mark = f"\ue000{secrets.token_hex(8)}\ue001"
    marked_messages, marked_extra = mark_strings([list(messages), extra], special, mark)
    plain = render_chat(template, messages, **known, **extra)
    marked = render_chat(template, marked_messages, **known, **marked_extra)
    parts = split_special(marked, special)
    own_control = [part for part in parts if isinstance(part, int)]
    if own_control == [part for part in split_special(plain, special) if isinstance(part, int)]:
        ids = tokenizer.encode(plain, allow_special=True)
        if own_control == [i for i in ids if i in text_of]:
            return ids
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.replace(mark, ""))
    return ids


def mark_strings(value: Any, special_tokens: Mapping[str, int], mark: str) -> Any:
    """A copy of nested messages in which no string can be part of a control token.

    `mark` goes behind every character that a control token begins with, before every one that it
    ends with, and before a string (inside its outer whitespace, which templates trim) that could
    continue a control token. Other strings, keywords among them, stay as they are.
    """
    if isinstance(value, Mapping):
        return {
            _mark_ends(key, special_tokens, mark): mark_strings(item, special_tokens, mark)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [mark_strings(item, special_tokens, mark) for item in value]
    if not isinstance(value, str) or value in KEYWORDS or not value.strip():
        return value
    core = value.strip()
    before, after = value.split(core, 1)
    continues = any(core in token[1:] for token in special_tokens)
    return before + mark * continues + _mark_ends(core, special_tokens, mark) + after


def _mark_ends(text: Any, special_tokens: Mapping[str, int], mark: str) -> Any:
    """Puts marks inside whatever in `text` could be the beginning or end of a control token."""
    if not isinstance(text, str):
        return text
    first = {token[0] for token in special_tokens if token}
    last = {token[-1] for token in special_tokens if token}
    return "".join(mark * (c in last) + c + mark * (c in first) for c in text)
