"""The text form of a graph: one op per line, parsed back to an equal graph.

    graph captured "Net" batch=8
    alias "head.weight" = "embed.weight"
    %x = input("x") : float32[B,16]
    %w = parameter("fc.weight") : float32[4,16] {grad=true}
    %y = aten.linear.default(%x, %w) : float32[B,4] {grad=true} @ "fc" "net.py:7"
    %output = output((%y,))

An op of several results has its types in parentheses. `from(...)` and `by(...)` tell where an op that
a pass made comes from.
"""

import json
import re
from collections.abc import Iterator

from graphpar.errors import VerifyError
from graphpar.ir.graph import LEVELS, Graph
from graphpar.ir.ops import Argument, Attribute, BatchSize, Dim, Op, Ref, Symbol, TensorType

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<ref>%[^\s,()\[\]{}=:]+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<batch>(?:\d+\*)?B(?:@\d+:\d+(?:/\d+)+)?(?![\w.:]))
    | (?P<number>-?(?:inf|nan|\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?![\w.]))
    | (?P<word>[A-Za-z_][\w.]*(?::[\w.:-]+)?)
    | (?P<mark>[()\[\]{},=:@])
    )""",
    re.VERBOSE,
)


def format_argument(argument: Argument) -> str:
    """One argument as text.

    >>> format_argument((Ref("x"), 2, -1.5, None, True, "mean", BatchSize(3)))
    '(%x, 2, -1.5, none, true, "mean", 3*B)'
    """
    if isinstance(argument, bool):
        return "true" if argument else "false"
    if argument is None:
        return "none"
    if isinstance(argument, str):
        return json.dumps(argument)
    if isinstance(argument, complex):
        return f"complex({argument.real!r}, {argument.imag!r})"
    if isinstance(argument, tuple):
        inner = ", ".join(format_argument(a) for a in argument)
        return f"({inner},)" if len(argument) == 1 else f"({inner})"
    return repr(argument) if isinstance(argument, (int, float)) else str(argument)


def format_op(op: Op) -> str:
    """One op as one line."""
    arguments = [format_argument(a) for a in op.args]
    arguments += [f"{key}={format_argument(value)}" for key, value in op.kwargs]
    line = f"%{op.name} = {op.target}({', '.join(arguments)})"
    types = ", ".join("none" if t is None else str(t) for t in op.types)
    if op.is_tuple:
        line += f" : ({types})"
    elif types:
        line += f" : {types}"
    if op.attrs:
        line += " {" + ", ".join(f"{k}={format_argument(v)}" for k, v in op.attrs) + "}"
    if op.module or op.source:
        line += f" @ {json.dumps(op.module)} {json.dumps(op.source)}"
    if op.origin:
        line += " from(" + ", ".join(f"%{name}" for name in op.origin) + ")"
    if op.made_by != "capture":
        line += f" by({json.dumps(op.made_by)})"
    return line


def format_graph(graph: Graph) -> str:
    """The whole graph as text, ending in a newline."""
    lines = [f"graph {graph.level} {json.dumps(graph.name)} batch={graph.batch}"]
    for name, others in graph.aliases.items():
        lines += [f"alias {json.dumps(other)} = {json.dumps(name)}" for other in others]
    lines += [format_op(op) for op in graph.ops]
    return "\n".join(lines) + "\n"


class _Tokens:
    """A cursor over the tokens of one line; errors name the line."""

    def __init__(self, line: str, number: int) -> None:
        self.line, self.number = line, number
        self.items = list(self._split())
        self.index = 0

    def _split(self) -> Iterator[tuple[str, str]]:
        position, end = 0, len(self.line.rstrip())
        while position < end:
            match = _TOKEN.match(self.line, position)
            if match is None:
                raise self.error(f"unreadable text at column {position + 1}")
            assert match.lastgroup is not None
            yield match.lastgroup, match.group(match.lastgroup)
            position = match.end()

    def error(self, why: str) -> VerifyError:
        return VerifyError(f"Graph text, line {self.number}: {why}: {self.line.strip()!r}")

    def peek(self) -> str:
        return self.items[self.index][1] if self.index < len(self.items) else ""

    def take(self, *expected: str) -> str:
        if self.index >= len(self.items):
            raise self.error(f"ends where {' or '.join(expected) or 'more'} should follow")
        kind, text = self.items[self.index]
        if expected and text not in expected and kind not in expected:
            raise self.error(f"{text!r} stands where {' or '.join(expected)} should")
        self.index += 1
        return text

    def string(self) -> str:
        return self.unquoted(self.take("string"))

    def unquoted(self, text: str) -> str:
        try:
            value: str = json.loads(text)
        except ValueError:
            raise self.error(f"{text} is no string") from None
        return value

    def done(self) -> bool:
        return self.index >= len(self.items)

    def end(self) -> None:
        if not self.done():
            raise self.error(f"{self.peek()!r} follows where the line should end")


def _parse_argument(tokens: _Tokens) -> Argument:
    kind, text = tokens.items[tokens.index] if not tokens.done() else ("", "")
    tokens.take()
    if kind == "ref":
        return Ref(text[1:])
    if kind == "string":
        return tokens.unquoted(text)
    if kind == "batch":
        whole, _, part = text.partition("@")
        member, _, parts = part.partition(":")
        return BatchSize(
            int(whole[:-2]) if "*" in whole else 1,
            tuple(map(int, parts.split("/"))) if parts else (),
            int(member or 0),
        )
    if kind == "number":
        return float(text) if re.search(r"[.e]|inf|nan", text) else int(text)
    if text == "(":
        items: list[Argument] = []
        while tokens.peek() != ")":
            items.append(_parse_argument(tokens))
            if tokens.peek() != ")":
                tokens.take(",")
        tokens.take(")")
        return tuple(items)
    return _parse_word(text, tokens)


def _parse_word(text: str, tokens: _Tokens) -> Argument:
    words: dict[str, Argument] = {"none": None, "true": True, "false": False}
    if text in words:
        return words[text]
    if text in ("inf", "nan"):
        return float(text)
    if text == "complex":
        pair = _parse_argument(tokens)
        numbers = [p for p in pair if isinstance(p, (int, float))] if isinstance(pair, tuple) else []
        if len(numbers) != 2:
            raise tokens.error("a complex number needs a real and an imaginary part")
        return complex(*numbers)
    kind, colon, value = text.partition(":")
    if not colon:
        raise tokens.error(f"{text!r} is no argument")
    return Symbol(kind, value)


def _parse_type(tokens: _Tokens) -> TensorType | None:
    dtype = tokens.take("word")
    if dtype == "none":
        return None
    tokens.take("[")
    shape: list[Dim] = []
    while tokens.peek() != "]":
        size = _parse_argument(tokens)
        if not isinstance(size, (int, BatchSize)):
            raise tokens.error("a size is neither a number nor a batch size")
        shape.append(size)
        if tokens.peek() != "]":
            tokens.take(",")
    tokens.take("]")
    return TensorType(tuple(shape), dtype)


def _parse_types(tokens: _Tokens) -> tuple[tuple[TensorType | None, ...], bool]:
    if tokens.peek() != "(":
        return (_parse_type(tokens),), False
    tokens.take("(")
    types: list[TensorType | None] = []
    while tokens.peek() != ")":
        types.append(_parse_type(tokens))
        if tokens.peek() != ")":
            tokens.take(",")
    tokens.take(")")
    return tuple(types), True


def _parse_call(
    tokens: _Tokens,
) -> tuple[tuple[Argument, ...], tuple[tuple[str, Argument], ...]]:
    args: list[Argument] = []
    kwargs: list[tuple[str, Argument]] = []
    tokens.take("(")
    while tokens.peek() != ")":
        follows = tokens.items[tokens.index + 1][1] if tokens.index + 1 < len(tokens.items) else ""
        if follows == "=":
            key = tokens.take("word", "batch")
            tokens.take("=")
            kwargs.append((key, _parse_argument(tokens)))
        else:
            args.append(_parse_argument(tokens))
        if tokens.peek() != ")":
            tokens.take(",")
    tokens.take(")")
    return tuple(args), tuple(kwargs)


def _parse_attrs(tokens: _Tokens) -> tuple[tuple[str, Attribute], ...]:
    tokens.take("{")
    attrs: list[tuple[str, Attribute]] = []
    while tokens.peek() != "}":
        key = tokens.take("word")
        tokens.take("=")
        value = _parse_argument(tokens)
        if isinstance(value, tuple):
            attrs.append((key, tuple(v for v in value if isinstance(v, int))))
        elif isinstance(value, (int, str)):
            attrs.append((key, value))
        else:
            raise tokens.error(f"attribute {key!r} has an unusable value")
        if tokens.peek() != "}":
            tokens.take(",")
    tokens.take("}")
    return tuple(sorted(attrs))


def parse_op(line: str, number: int = 1) -> Op:
    """One op from its line.

    Raises:
        VerifyError: The line does not follow the form; names the line and what was expected.

    >>> parse_op('%y = aten.relu.default(%x) : float32[B,4]').type
    TensorType(shape=(BatchSize(times=1), 4), dtype='float32')
    """
    tokens = _Tokens(line, number)
    name = tokens.take("ref")[1:]
    tokens.take("=")
    target = tokens.take("word")
    args, kwargs = _parse_call(tokens)
    types: tuple[TensorType | None, ...] = ()
    is_tuple = False
    attrs: tuple[tuple[str, Attribute], ...] = ()
    module = source = ""
    origin: tuple[str, ...] = ()
    made_by = "capture"
    while not tokens.done():
        mark = tokens.take(":", "{", "@", "from", "by")
        if mark == ":":
            types, is_tuple = _parse_types(tokens)
        elif mark == "{":
            tokens.index -= 1
            attrs = _parse_attrs(tokens)
        elif mark == "@":
            module, source = tokens.string(), tokens.string()
        elif mark == "from":
            refs, _ = _parse_call(tokens)
            origin = tuple(r.name for r in refs if isinstance(r, Ref))
        else:
            tokens.take("(")
            made_by = tokens.string()
            tokens.take(")")
    return Op(name, target, args, kwargs, types, is_tuple, module, source, origin, made_by, attrs)


def parse_graph(text: str) -> Graph:
    """A graph from its text form.

    Raises:
        VerifyError: The text does not follow the form, or an op reads a value defined later.

    >>> text = 'graph captured "N" batch=2\\n%x = input("x") : int64[B]\\n%output = output((%x,))\\n'
    >>> format_graph(parse_graph(text)) == text
    True
    """
    lines = text.splitlines()
    head = _Tokens(lines[0] if lines else "", 1)
    head.take("graph")
    level = head.take(*LEVELS)
    name = head.string()
    head.take("batch")
    head.take("=")
    batch = _parse_argument(head)
    if type(batch) is not int:
        raise head.error("the batch is no whole number")
    head.end()
    aliases: dict[str, tuple[str, ...]] = {}
    ops: list[Op] = []
    for number, line in enumerate(lines[1:], start=2):
        if line.startswith("alias "):
            tokens = _Tokens(line, number)
            tokens.take("alias")
            other = tokens.string()
            tokens.take("=")
            used = tokens.string()
            tokens.end()
            aliases[used] = (*aliases.get(used, ()), other)
        elif line.strip():
            ops.append(parse_op(line, number))
    exact = next(candidate for candidate in LEVELS if candidate == level)
    return Graph(ops, level=exact, name=name, batch=batch, aliases=aliases)
