"""Calling a function of torch_mlu_ops by this plugin's names for its arguments.

Where a function tells the names of its arguments, each is passed by the name found there, and the order does
not matter. Where it does not (a compiled function, or one behind a decorator that hides it), the orders that
public text knows are *ways* to call it; which of them is right is for `opsin_device_mlu.trials` to find out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opsin_device_mlu.book import Function

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Unbindable(Exception):
    """A function has other arguments than are known. The text says which."""


class Call:
    """One way to call a function. Called with this plugin's names as keywords.

    Args:
        function: of the package.
        how: in a word or two, for ``opsin doctor``.
        keywords: this plugin's name -> the function's; None: pass by position.
        order: this plugin's names, by position, where there are no keywords.
        constants: what is passed where nothing is given: by the function's names, or by this plugin's if the
            call is by position.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        how: str,
        *,
        keywords: Mapping[str, str] | None = None,
        order: Sequence[str] = (),
        constants: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> None:
        self._function, self.how = function, how
        self._keywords, self._order, self._whole = keywords, order, whole
        self._constants = dict(constants or {})

    def __call__(self, **given: Any) -> Any:
        """Call the function; what it gives."""
        if self._keywords is not None:
            keywords = self._keywords
            named = {keywords[name]: value for name, value in given.items() if name in keywords}
            return self._function(**(self._constants | named if self._constants else named))
        last = len(self._order)
        if not self._whole:
            last = 1 + max(i for i, name in enumerate(self._order) if name in given)
        values = [given[n] if n in given else self._constants[n] for n in self._order[:last]]
        return self._function(*values)


def ways(function: Callable[..., Any], known: Function, *, trust: bool = False) -> list[Call]:
    """The ways in which a function may be called, the likeliest first.

    Args:
        function: of the package.
        known: of it.
        trust: call it in the callers' order, whatever its arguments are named.

    Raises:
        Unbindable: the names it shows are others than are known.
    """
    shown = [] if trust else list(_shown(function))
    reasons: list[Unbindable] = []
    for parameters, by_keyword in shown:
        try:
            return [_by_names(function, known, parameters, by_keyword)]
        except Unbindable as error:
            reasons.append(error)
    if reasons:
        raise reasons[0]
    found = [Call(function, "in the callers' order", order=known.arguments, constants=known.nothing)]
    if known.printed:
        order, constants = known.printed, known.nothing
        found.append(Call(function, "in the manual's order", order=order, constants=constants, whole=True))
    return found


def signature_text(function: Callable[..., Any]) -> str:
    """What a function says of its arguments, for a report."""
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return f"not told; {(function.__doc__ or '').strip()[:200]}"


def _shown(function: Callable[..., Any]) -> Iterator[tuple[list[inspect.Parameter], bool]]:
    """The parameters that a function names, and whether it takes them by keyword.

    Of a function that names none or not all, as a decorator's: also those of what it holds, any of which may
    be the function it stands for.
    """
    parameters = _parameters(function)
    if parameters is None:
        return
    if _names_any(parameters):
        yield parameters, all(p.kind is not p.POSITIONAL_ONLY for p in parameters)
    by_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not by_keyword and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    for inner in _wrapped(function):
        beneath = _parameters(inner)
        if beneath is not None and _names_any(beneath):
            yield beneath, by_keyword


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _names_any(parameters: Sequence[inspect.Parameter]) -> bool:
    return any(p.kind in (*_NAMED, p.KEYWORD_ONLY) for p in parameters)


def _wrapped(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What a decorator's function holds that may be the function it stands for, to any depth."""
    found: list[Callable[..., Any]] = []
    todo = [function]
    while todo and len(found) < 20:
        outer = todo.pop(0)
        held = [getattr(outer, "__wrapped__", None)]
        for cell in getattr(outer, "__closure__", None) or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        inner = [x for x in held if callable(x) and not isinstance(x, type) and x not in found]
        found += inner
        todo += inner
    return found


def _by_names(
    function: Callable[..., Any], known: Function, shown: Sequence[inspect.Parameter], by_keyword: bool
) -> Call:
    """A call by the names that a function shows.

    Raises:
        Unbindable: one that it needs is not known, or one that is needed here is not there.
    """
    names = {_plain(p.name): p for p in shown if p.kind in (*_NAMED, p.KEYWORD_ONLY)}
    used = list(dict.fromkeys([*known.arguments, *known.nothing]))
    matched: dict[str, inspect.Parameter] = {}
    for name in used:
        for spelling in (name, *known.spellings.get(name, ())):
            parameter = names.get(_plain(spelling))
            if parameter is not None and parameter not in matched.values():
                matched[name] = parameter
                break
    listed = ", ".join(p.name for p in names.values())
    lacking = [name for name in known.arguments if name not in matched and name not in known.nothing]
    if lacking:
        raise Unbindable(f"takes ({listed}); expected one that means {', '.join(lacking)}")
    strange = [p.name for p in names.values() if p.default is p.empty and p not in matched.values()]
    if strange:
        raise Unbindable(f"takes ({listed}); what {', '.join(strange)} means is not known")
    needed = {
        name: known.nothing[name]
        for name, p in matched.items()
        if name in known.nothing and p.default is p.empty
    }
    if by_keyword:
        keywords = {name: p.name for name, p in matched.items()}
        constants = {keywords[name]: value for name, value in needed.items()}
        return Call(function, "by the names of its arguments", keywords=keywords, constants=constants)
    reverse = {p.name: name for name, p in matched.items()}
    order: list[str] = []
    values: dict[str, Any] = {}
    for p in names.values():
        name = reverse.get(p.name, p.name)
        order.append(name)
        values[name] = known.nothing.get(name) if p.default is p.empty else p.default
    how = "in the order of its arguments"
    return Call(function, how, order=order, constants=values, whole=True)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
