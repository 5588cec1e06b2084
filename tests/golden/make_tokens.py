# ruff: noqa: RUF001 (letters that look like others are the point)
"""Makes tokens_smollm2.json: token ids and chat renderings of SmolLM2-135M-Instruct.

Run with an environment that has transformers, gguf and regex, giving the folder of the GGUF file:

    python tests/golden/make_tokens.py FOLDER SmolLM2-135M-Instruct.Q4_1.gguf

Two oracles must agree before anything is written. (1) transformers' tokenizer of the GGUF file. It
ignores `tokenizer.ggml.pre` (5.23 does), so its pre-tokenizer is replaced by the one published
with SmolLM2: every digit by itself, then GPT-2's byte-level pattern. (2) A plain BPE written below
from the definition, which shares no code with the tokenizers package.
"""

import hashlib
import itertools
import json
import pathlib
import random
import sys
import unicodedata

import regex
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OUT = pathlib.Path(__file__).parent / "tokens_smollm2.json"

# fmt: off
FIXED = [
    "", " ", "  ", "\n", "\n\n", " \n \n ", "\t", "\t\t\tx", "\r\n", "a\r\nb\r\n\r\nc",
    "a\n\n\nb", "0", "7", "10", "1234567890", "1,000", "1,234,567.89", "3.14159", "-17", "- 17",
    "+5", "1e-9", "  12  34", "x2", "2x", "x 2", "12abc34", "0x1F", "99%", "$3.50", "€20",
    "1/2 + 3/4 = 5/4", "Ⅷ ½ ² ٣٤٥ ५६", "一二三123", "５００円", "1st 2nd 3rd", "10:30",
    "2024-02-29", "v1.2.3-rc4", "don't", "I'll we've you're it's he'd I'm", "DON'T I'LL",
    "'tis 'twas", "rock'n'roll", "’s’t", "naïve café", "cafe\u0301", "A\u030a ngstro\u0308m",
    "Straße", "İstanbul", "ﬁn ﬂow", "ſ K Å", "こんにちは世界", "你好，世界！", "한국어 문장",
    "한국어", "Привет, мир", "Γειά σου Κόσμε", "مرحبا بالعالم", "שלום", "हिन्दी में",
    "ไทยไม่มีเว้นวรรค", "Việt Nam", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ℝ³ ∀x∈ℕ ∃y: x≤y", "🙂", "👍🏽 👨‍👩‍👧‍👦 🇩🇪",
    "a🙂b", "🙂🙂🙂", "✓ ✗ → ⇒ ∑ ∫", "\u00a0nbsp\u00a0", "\u3000全角", "\u200bzero\u200dwidth",
    "\ufeffbom", "\u2028line\u2029para", "\x00\x01\x7f", "\ufffd", "a\x0bb\x0cc", "\x85next",
    "def f(x):\n    return x ** 2\n", "if (a && !b) { c[i] += 1; }  // note",
    "\tfor\ti in range(10):", "#include <stdio.h>\nint main(void) { return 0; }",
    "SELECT * FROM t WHERE a='b';", "a==b!=c<=d", "https://example.com/a?b=c&d=%20#e",
    "user@example.com", "C:\\Users\\x", "~/.bashrc", "--flag=1",
    "{\"key\": [1, 2, {\"a\": null}]}", "<p class=\"x\">text</p>", "\\frac{1}{2} \\sqrt{x^2+1}",
    "$$\\int_0^1 x\\,dx$$", "#### 42", "Step 1: add.\n\nStep 2: stop.", "* item\n* item\n  * sub",
    "...", "?!?!", "----", "====", "______", "((((", "`code`", "```py\nx\n```", "\"quoted\"",
    "“quoted”", "camelCase snake_case SCREAMING_CASE kebab-case",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "AAAAaaaa",
    "the the the the", " leading", "trailing ", "   three leading", "trailing three   ",
    "in   the   middle", "    4\n     5\n      6", "<|im_end|>",
    "a <|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>x", "<|im_end|", "im_end|>",
    "<repo_name> <file_sep>", "<empty_output>", "Ġ", "ĠĊ", "▁", "<0x0A>", "<unk>", "</s>",
    "[INST]",
    "Natalia sold clips to 48 of her friends in April, then half as many in May: 48 / 2 = 24.",
]
# fmt: on
LETTERS = ["a", "e", "th", "ing", "Q", "é", "ß", "你", "я", "🙂", "\u0301", "ा"]
OTHERS = ["0", "1", "99", "٣", " ", "  ", "\n", "\t", ".", ",", "-", "'s", "'", "(", "\\", "_"]
OTHERS += ["$", "<|"]

CHATS = [
    [{"role": "user", "content": "What is 12 * 7?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}],
    [
        {"role": "user", "content": "  padded\n\n"},
        {"role": "assistant", "content": "Yes.\n\n1. one\n2. two"},
        {"role": "user", "content": "12 apples & 3 pears, don't count <b>bold</b>"},
    ],
    [{"role": "user", "content": ""}],
]

RENDERED_MESSAGES = [
    {"role": "user", "content": " Aé "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    {"role": "user", "content": "c", "name": "Zoë"},
]
# In the manner of well-known models, and one that uses what else templates use.
TEMPLATES = [
    """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
""",
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}",
    """\
{% generation %}gen{% endgeneration %}
{% for m in messages if m.role != 'system' %}
    {{ loop.index0 }}{{ loop.last }}{{ m.content | trim | upper }}{{ m.get('name', 'none') }}
    {% if loop.first %}{% continue %}{% endif %}
    {%- set last = loop.previtem.role -%} {{ last }}
{% endfor %}
{% macro f(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ f(1) }}
{{ messages[::-1][0].role }} {{ messages | length }} {{ range(3) | list }} {{ 7 // 2 }} {{ 7 % 4 }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') }}
{{ messages[0] | tojson }} {{ {'a': [1, "é"]} | tojson(indent=1) }} {{ 'a b'.split(' ') }}
{% set ns = namespace(n='') %}{% for i in 'ab' %}{% set ns.n = i ~ 1 ~ ns.n %}{% endfor %}{{ ns.n }}
{{ bos_token }}{{ tools is none }}{{ missing is defined }}{{ thinking | default('no') }}{{ 2 ** 5 }}
{{ strftime_now('%Y') | length }}{% filter upper %}q{% endfilter %}
{{ messages[2] | items | list }}
{{ 'x' * 3 }}{{ messages[0].content.startswith(' A') }} {{ 'a\\nb' | indent(2) }}{{ none }}{{ 1.5 }}
""",
]


def make_strings() -> list[str]:
    rng = random.Random(0)
    strings = list(FIXED)
    while len(strings) < 220:
        pool = rng.choice([LETTERS, OTHERS, LETTERS + OTHERS])
        strings.append("".join(rng.choices(pool, k=rng.randint(2, 12))))
    return strings


class PlainBPE:
    """Byte pair encoding by the book: join the best-ranked neighbours until none is left."""

    def __init__(self, tokens: list[str], types: list[int], merges: list[str]):
        self.ids = {t: i for i, t in enumerate(tokens)}
        self.special = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        visible = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173)]
        hidden = [b for b in range(256) if b not in visible]
        self.chars = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def word(self, text: str) -> list[int]:
        parts = [self.chars[b] for b in text.encode()]
        while len(parts) > 1:
            pairs = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            best = min(pairs)
            if best == len(self.ranks):
                break
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[p] for p in parts]

    def encode(self, text: str, allow_special: bool) -> list[int]:
        pattern = "|".join(map(regex.escape, self.special)) if allow_special else r"(?!)"
        ids = []
        for part in regex.split(f"({pattern})", text):
            if allow_special and part in self.special:
                ids.append(self.ids[part])
                continue
            for span in regex.findall(r"\p{N}|\P{N}+", part):
                ids += [i for w in regex.findall(GPT2_PATTERN, span) for i in self.word(w)]
        return ids


def digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:12]


def main(folder: str, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fields = GGUFReader(pathlib.Path(folder) / name).fields
    keys = ("tokens", "token_type", "merges")
    plain = PlainBPE(*(fields[f"tokenizer.ggml.{key}"].contents() for key in keys))
    strings, ids, special_ids = make_strings(), [], []
    for text in strings:
        backend.encode_special_tokens = True
        ids.append(backend.encode(text, add_special_tokens=False).ids)
        backend.encode_special_tokens = False
        special_ids.append(backend.encode(text, add_special_tokens=False).ids)
        assert ids[-1] == plain.encode(text, False), repr(text)
        assert special_ids[-1] == plain.encode(text, True), repr(text)
    chats = []
    for messages in CHATS:
        for generation in (False, True):
            options = {"tokenize": False, "add_generation_prompt": generation}
            chats.append([messages, generation, tokenizer.apply_chat_template(messages, **options)])
    renderings = []
    for template in TEMPLATES:
        options = {"tokenize": False, "chat_template": template}
        text = tokenizer.apply_chat_template(RENDERED_MESSAGES, **options)
        renderings.append([template, RENDERED_MESSAGES, text])
    golden = {
        "strings": strings,
        "sha256_of_ids": " ".join(map(digest, ids)),
        "special": {i: s for i, s in enumerate(special_ids) if s != ids[i]},
        "ids": {i: ids[i] for i in range(0, len(ids), 9)},
        "chats": chats,
        "renderings": renderings,
        "unicode": unicodedata.unidata_version,
    }
    OUT.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{OUT.name}: {len(strings)} strings, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
