"""Rendering of untrusted jinja2 templates within a budget of work.

A chat template arrives with a downloaded checkpoint, so it is a program by a stranger. jinja2's
sandbox keeps it away from Python's internals and from files, but not from using all time and
memory. The one idea here: every loop turn, every call and every value that a template builds is
charged by its size against one budget, before the value is built where it could be large. Since
no value is free, what is not charged (attribute access, branches) is small beside what is.

`range` and the few string methods and filters that can multiply sizes (`replace`, `join`, ...)
have a price of their own; the ones that pad or format to a given width are not offered.
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 1 << 18
BASE_BUDGET = 500_000  # characters and loop turns; large templates use some 10,000
BUDGET_PER_INPUT_CHAR = 64

_STRING_METHODS = (
    "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower "
    "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase "
    "title upper"
)
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select "
    "selectattr sort string title trim unique upper wordcount"
)
STRING_METHODS = frozenset(_STRING_METHODS.split())
FILTERS = frozenset(_FILTERS.split())

_left: contextvars.ContextVar[int] = contextvars.ContextVar("template_budget")


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Renders `template` as Hugging Face does, but within the budget.

    Raises:
        ValueError: the template is malformed, calls `raise_exception`, reaches for something
            that the sandbox forbids, or does too much work.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"chat template has {len(template)} characters; "
            f"at most {MAX_TEMPLATE_CHARS} are accepted"
        )
    token = _left.set(BASE_BUDGET)
    try:
        compiled = _compile(template)
        _left.set(BASE_BUDGET + BUDGET_PER_INPUT_CHAR * _size(variables, 1 << 40))
        parts = []
        for part in compiled.generate(**variables):
            _charge(len(part))
            parts.append(part)
        return "".join(parts)
    except Exception as error:  # a template may fail in any way that Python can
        raise ValueError(f"chat template failed: {type(error).__name__}: {error}") from error
    finally:
        _left.reset(token)


def _charge(amount: int) -> None:
    left = _left.get() - amount
    if left < 0:
        raise SecurityError("too much work or output for a chat template")
    _left.set(left)


def _size(value: Any, limit: int) -> int:
    """Number of characters and items in a value, nested ones included; stops past `limit`."""
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += 1
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, Sequence | set | frozenset):
            stack += item
        elif isinstance(item, int):
            total += item.bit_length() // 8
        elif isinstance(item, Namespace):
            # Its attributes can be set later, so no price of what holds it would stay true.
            raise SecurityError("a namespace can only be used through its attributes")
    return total


def _pay(value: Any, times: int = 1) -> Any:
    _charge(_size(value, _left.get()) * max(times, 1))
    return value


def _pay_length(value: Any) -> Any:
    """Charges for the items alone; an iterator is run through, to know how many there are."""
    if isinstance(value, Iterator):
        items = []
        for item in value:
            _charge(1)
            items.append(item)
        return items
    if hasattr(value, "__len__"):
        _charge(len(value))
    return value


def _pay_turn(amount: int) -> None:
    _charge(amount)


def _price_of_replace(text: Any, old: Any, new: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a price on operators and calls."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting is not offered to chat templates")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _charge(left.bit_length() * abs(right) // 8)
        elif operator == "*" and isinstance(left, int) and not isinstance(right, int | float):
            _pay(right, left)
        elif operator == "*" and isinstance(right, int) and not isinstance(left, int | float):
            _pay(left, right)
        _pay((left, right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, str) and callable(value) and attr not in STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is out of a template's reach")

    def call(self, context, obj, *args, **kwargs):  # type: ignore[override]
        _charge(1)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _pay((owner, args))
            if obj.__name__ == "replace":
                _charge(_price_of_replace(owner, *args[:2]))
            elif obj.__name__ == "join":
                _pay(owner, len(args[0]))
        result = super().call(context, obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else _pay(result)


def _priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays for its arguments before, and for its result after."""

    # `wraps` copies jinja2's mark of functions that take the environment or context first.
    @functools.wraps(function)
    def pay_and_call(*args, **kwargs):
        own = hasattr(function, "jinja_pass_arg")
        given = list(args[own:])
        if name == "join":
            given[0] = _pay_length(given[0])
            _pay(given[1] if len(given) > 1 else kwargs.get("d", ""), len(given[0]))
        elif name == "replace":
            _charge(_price_of_replace(*given[:3]))
        elif name == "indent":
            width = given[1] if len(given) > 1 else kwargs.get("width", 4)
            _charge((str(given[0]).count("\n") + 1) * (width if isinstance(width, int) else 1))
            _pay(width, str(given[0]).count("\n"))
        _pay(given)
        return _pay(function(*args[:own], *given, **kwargs))

    return pay_and_call


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; it renders as its body."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _AddPrices(NodeTransformer):
    """Writes the charges for loops, literals, slices and comparisons into a template's tree.

    A charge is a filter whose name no template can spell.
    """

    def _filter(self, name: str, value: nodes.Node) -> nodes.Filter:
        return nodes.Filter(value, name, [], [], None, None)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filter("pay_length!", node.iter)
        amount = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(self._filter("pay_turn!", nodes.Const(amount))))
        return node

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._filter("pay!", node)

    visit_List = visit_Tuple = visit_Dict = _visit_literal

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for side in (node, *node.ops):
            side.expr = self._filter("pay!", side.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter("pay_length!", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = [self._filter("string", part) for part in node.nodes]
        return functools.reduce(nodes.Add, parts)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise SecurityError(f"tojson with indent {indent!r}")
    _pay(value, 8 * (1 + (indent or 0)))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _range(*bounds: int) -> range:
    return _pay_length(range(*bounds))


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # else constants are folded, unpaid, while compiling
        finalize=_pay,
        extensions=[_GenerationTag, loopcontrols],
    )
    offered = {name: environment.filters[name] for name in FILTERS} | {"tojson": _tojson}
    environment.filters = {name: _priced(name, f) for name, f in offered.items()} | {
        "pay!": _pay,
        "pay_length!": _pay_length,
        "pay_turn!": _pay_turn,
    }
    environment.tests = {name: _priced(name, f) for name, f in environment.tests.items()}
    environment.globals = {
        "range": _range,
        "dict": dict,
        "namespace": Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = _environment()
    tree = environment.parse(template)
    tree = _AddPrices().visit(tree).set_environment(environment)
    for node in tree.find_all(nodes.Node):
        node.set_lineno(node.lineno or 1)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))
