"""Answers in a model's text, read as exact numbers.

The one idea: a number is parsed as a whole token with its sign, separators, fraction and
exponent, or not at all. `1,000` = `1000.0` = `$1,000.00`, while `1.5`, `15` and `1.5.2` stay three
different things: comparing digits alone makes 1.5 equal 15. Whatever looks like part of a larger
token (a date, a clock time, a power, a malformed `1,00`) is no number. Currency signs, percent
signs and units are dropped, so `50%` is 50. Linear time in the text's length.
"""

import itertools
import re
from fractions import Fraction

MAX_NUMBER_CHARS = 100
MAX_SEGMENT_CHARS = 300
MAX_MARKS = 16

_CURRENCY = r"[$€£¥₹]"
_MINUS = r"[-\u2212]"
# The guards before and after refuse a token whole, so that no part of one is taken for a number.
_NUMBER = re.compile(
    rf"""
    (?<!\w) (?<![0-9][.,:]) (?<![/^]) (?<!/[ ]) (?<![0-9]\*\*)
    (?P<sign> (?<![)\]]){_MINUS}(?:{_CURRENCY}[ ]?)?(?=[0-9.])
            | {_CURRENCY}[ ]?{_MINUS}(?=[0-9.]) )?
    (?: (?P<whole>[0-9]++)[ ](?P<part>[0-9]++/[0-9]++)
      | (?P<digits> [0-9]{{1,3}}(?:,[0-9]{{3}})++(?:\.[0-9]++)? | [0-9]++(?:\.[0-9]++)?
                  | (?<!\.)\.[0-9]++ )
        (?P<exponent>[eE][-+]?[0-9]{{1,2}})? (?:[ ]?/[ ]?(?P<under>[0-9]++))? )
    (?! [.,:_]?[0-9] | [eE][-+]?[0-9] | [ ]?/[ ]?[0-9] | [ ]*\^ | [⁰¹²³⁴-⁹]
      | \*\*[0-9(] | [ ]+\*\*[ ]+[0-9(] )
    """,
    re.VERBOSE,
)
_OPERATOR = re.compile(rf"\s*[-+*/\u2212\u00d7\u00f7\u00b7x]\s*(?:{_CURRENCY}\s?)?")
_EQUALS = re.compile(rf"\s*=\s*(?:{_CURRENCY}\s?)?")
_HASHES = re.compile(r"####")
_ANSWER_IS = re.compile(r"\banswer\s*(?:is|would\s+be|:|=)", re.IGNORECASE)
_HEADING = re.compile(r"[\s*:_]*(?:step|part|problem|question|example)\b", re.IGNORECASE)
_FRAC = re.compile(r"([0-9]?)\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}")
_TEX_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_TEX_NOTHINGS = re.compile(r"\\[,!;:]|\\left|\\right|\^\\circ|\^\{\\circ\}")
_TEX_BRACKETS = re.compile(r"\\[()\[\]]")


def parse_number(text: str) -> Fraction | None:
    """The number that `text` is, decorations and a unit after it allowed, or None.

    `"$1,000.00"`, `"18 apples."`, `"3/4"`, `"\\frac{3}{4}"` and `"50%"` are numbers;
    `"15 or 16"`, `"Route 66"`, `"1/0"` and `"1.5.2"` are not.
    """
    text = _plain(text)
    if len(text) > 10 * MAX_NUMBER_CHARS:
        return None
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or re.search(r"\w", text[: found[0].start()]):
        return None
    if re.search(r"(?<![\w^])[0-9]", text[found[0].end() :]):
        return None
    return _value(found[0])


def find_numbers(text: str) -> list[Fraction]:
    """All numbers in `text`, in order."""
    values = (_value(match) for match in _NUMBER.finditer(_plain(text)))
    return [value for value in values if value is not None]


def format_number(value: Fraction) -> str:
    """The one way to write a number: `18`, `-0.75`, or `1/3` where decimals would not end."""
    ending = (p for p in range(1, MAX_NUMBER_CHARS) if 10**p % value.denominator == 0)
    places = 0 if value.denominator == 1 else next(ending, 0)
    if places == 0:
        return str(value)
    digits = str(abs(int(value * 10**places))).zfill(places + 1)
    return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]


def extract_number(text: str) -> str | None:
    """The answer that a solution ends on, in canonical form, or None.

    Looks for `####`, then `\\boxed{}`, then "the answer is" (of each the last that holds a
    number), then takes the last number of the text.
    """
    for segment in find_marked(text):
        value = _first_number(segment)
        if value is not None:
            return format_number(value)
        if find_numbers(segment):
            return None
    numbers = find_numbers(text)
    return format_number(numbers[-1]) if numbers else None


def find_marked(text: str) -> list[str]:
    """What stands behind the answer marks of `text`, most trusted first."""
    hashes = _lines_behind(_HASHES, text)
    hashes = [line.split("####")[0] for line in hashes if not _HEADING.match(line)]
    said = _lines_behind(_ANSWER_IS, text)
    marked = hashes[::-1] + _boxed(text)[::-1] + said[::-1]
    return [segment for segment in marked if segment.strip()]


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > MAX_NUMBER_CHARS:
        return None
    try:
        if match["whole"] is not None:
            part = Fraction(match["part"])
            value = int(match["whole"]) + part
            if part >= 1:
                return None
        else:
            value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
            value /= int(match["under"] or 1)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] else value


def _first_number(segment: str) -> Fraction | None:
    """The first number of `segment`; of a written-out calculation `9 * 2 = 18` its result, of one
    without a result, `9 * 2`, none."""
    segment = _plain(segment)
    matches = list(_NUMBER.finditer(segment))
    chosen, computes = 0, False
    for i, (left, right) in enumerate(itertools.pairwise(matches)):
        between = segment[left.end() : right.start()]
        if _EQUALS.fullmatch(between):
            chosen, computes = i + 1, False
        elif _OPERATOR.fullmatch(between):
            computes = True
        else:
            break
    return _value(matches[chosen]) if matches and not computes else None


def _lines_behind(mark: re.Pattern[str], text: str) -> list[str]:
    """Behind each of the last `MAX_MARKS` marks, the first line with something on it."""
    lines = []
    for match in list(mark.finditer(text))[-MAX_MARKS:]:
        start = match.end()
        while start < len(text) and text[start] in " \t\r\n:*":
            start += 1
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        lines.append(text[start : min(end, start + MAX_SEGMENT_CHARS)])
    return lines


def _boxed(text: str) -> list[str]:
    contents = []
    for match in list(re.finditer(r"\\boxed\{", text))[-MAX_MARKS:]:
        depth, end = 1, match.end()
        while end < len(text) and depth and end - match.end() <= MAX_SEGMENT_CHARS:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth == 0:
            contents.append(text[match.end() : end - 1])
    return contents


def _plain(text: str) -> str:
    """`text` with the TeX that models wrap numbers in written out."""
    if "\\" not in text and "{,}" not in text:
        return text
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = _TEX_WORDS.sub(r" \1", _TEX_NOTHINGS.sub("", _TEX_BRACKETS.sub(" ", text)))
    return _FRAC.sub(lambda m: (f"{m[1]} " if m[1] else "") + f"{m[2]}/{m[3]}", text)
