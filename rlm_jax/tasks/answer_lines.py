"""Which line of a solution is its answer, and what that line says: rules that bytes can follow.

The one idea: a rule that a device verifier must follow byte by byte is stated on bytes. The answer
stands behind the last `####` that has something behind it: on the first line there that is not
blank. In a text without such a mark it is the last line that is not blank. Blanks are ASCII
whitespace and the marks around an answer, `#`, `:` and `*`.

Narrower than `answers.py` (no TeX, no "the answer is" inside a line), because
`answer_device.py` says the same thing inside jit.
"""

MARK = b"####"
BLANKS = b" \t\n\r\v\f#:*"


def find_answer_line(text: str) -> bytes | None:
    """The line of `text` that holds its answer, as UTF-8, or None for a text of blanks.

    `"2 + 2 = 4\\n#### 4\\n"` gives `b" 4"`; `"2 + 2 = 4\\n####"` gives `b"2 + 2 = 4"`.
    """
    before, *behind = text.encode("utf-8", "surrogatepass").split(MARK)
    for piece in reversed(behind):
        for line in piece.split(b"\n"):
            if line.strip(BLANKS):
                return line
    for line in reversed(before.split(b"\n")):
        if line.strip(BLANKS):
            return line
    return None


def find_answer_text(text: str) -> str | None:
    """The same line as text, for answers that no device verifier reads."""
    line = find_answer_line(text)
    return None if line is None else line.decode("utf-8", "replace")
