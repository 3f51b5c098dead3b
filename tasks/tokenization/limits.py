"""Limits of a chat template: one that loops on or swells is refused, wherever it is rendered.

Jinja's sandbox keeps a template from files and from Python; it does not keep it from nested loops over long ranges, nor
from texts that double. Legitimate templates render a conversation in milliseconds.
"""

import ctypes
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

from jinja2 import Environment, Template
from jinja2.runtime import markup_join, str_join

from tasks.tokenization.joins import compile_with_joins

MAX_SECONDS = 15.0
MAX_SLOW_SECONDS = 30.0
"""Of processor time, for all renderings of a process together that take longer than SLOW_SECONDS each."""
SLOW_SECONDS = 0.25
MAX_CHARACTERS = 50_000_000
_MAX_EXPONENT = 64
_MAX_NUMBER = 10**30
_PIECES_AT_ONCE = 10_000
_LOOK_SECONDS = 0.25

R = TypeVar("R")

_slow_seconds = 0.0
_deadlines: dict[int, float] = {}
"""When each thread's rendering has taken too long, by the thread's number."""
_lock = threading.Lock()
_watch: threading.Thread | None = None


class TemplateLimitError(ValueError):
    """A template that takes too long or writes too much: nothing can be trained with it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else f"the chat template took longer than {MAX_SECONDS:g} seconds"


def call_limited(name: str, render: Callable[..., R], **inputs: Any) -> R:
    """Call a function that renders, and interrupt it once it takes too long.

    Python code is interrupted between two of its instructions; `compile_limited` keeps short what runs in C within one.

    Args:
        name: of the template, for the error.
        render: is called.
        inputs: of it.

    Raises:
        TemplateLimitError: it took longer than MAX_SECONDS, slow ones have come too often, or it wrote too much.
    """
    if _watch is None:
        _start_watch()
    thread, began = threading.get_ident(), time.thread_time()
    _deadlines[thread] = time.monotonic() + MAX_SECONDS
    try:
        rendered = render(**inputs)
        if (spent := time.thread_time() - began) > SLOW_SECONDS:
            _count_slow(spent)
        return rendered
    except TemplateLimitError as error:
        raise TemplateLimitError(
            f"{error} for one conversation ({name}): it loops or repeats texts: set model.chat_template to another one"
        ) from None
    finally:
        _deadlines.pop(thread, None)


def compile_limited(sandbox: Environment, source: str) -> Template:
    """Compile a template so that its texts and numbers stay small; what it writes is the same.

    Args:
        sandbox: is not changed.
        source: of the template. Jinja computes constants while it compiles.
    """
    environment: Any = sandbox.overlay()
    environment.intercepted_binops = frozenset(environment.intercepted_binops | {"+", "*", "**"})
    environment.binop_table = {**environment.binop_table, "+": _add, "*": _multiply, "**": _raise_to_power}
    # They write something else every time.
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    environment.filters = {name: value for name, value in environment.filters.items() if name != "random"}
    joins = {"str_join": _limit_join(str_join), "markup_join": _limit_join(markup_join)}
    return compile_with_joins(environment, source, concat=_concat, **joins)


def _count_slow(seconds: float) -> None:
    global _slow_seconds
    _slow_seconds += seconds
    if _slow_seconds > MAX_SLOW_SECONDS:
        _slow_seconds = 0.0  # another template may come
        raise TemplateLimitError(f"the chat template took longer than {SLOW_SECONDS:g} seconds again and again, also")


def _check(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"the chat template wrote a text of more than {MAX_CHARACTERS:,} characters")


def _concat(pieces: Iterable[str]) -> str:
    """Join pieces as they come, so that no more than the limit is ever held."""
    rest, texts, characters = iter(pieces), [], 0
    while len(some := list(islice(rest, _PIECES_AT_ONCE))) == _PIECES_AT_ONCE:
        texts.append("".join(some))
        characters += len(texts[-1])
        _check(characters)
    text = "".join((*texts, *some))
    _check(len(text))
    return text


def _limit_join(join: Any) -> Any:
    def joined(pieces: Iterable[Any]) -> Any:
        texts = tuple(pieces)
        _check(sum(len(text) for text in texts if type(text) is str))
        return join(texts)

    return joined


def _add(left: Any, right: Any) -> Any:
    if type(left) is str and type(right) is str:
        _check(len(left) + len(right))
    return operator.add(left, right)


def _multiply(left: Any, right: Any) -> Any:
    for text, number in ((left, right), (right, left)):
        if isinstance(number, int) and isinstance(text, str | bytes | list | tuple):
            _check(len(text) * max(number, 0))
        elif isinstance(number, int) and isinstance(text, int) and abs(number) > _MAX_NUMBER:
            raise TemplateLimitError(f"the chat template multiplied a number above {_MAX_NUMBER:.0e}")
    return operator.mul(left, right)


def _raise_to_power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > _MAX_EXPONENT or abs(base) > _MAX_NUMBER:
        raise TemplateLimitError(f"the chat template raised {base!s:.20} to the power of {exponent!s:.20}")
    return operator.pow(base, exponent)


def _start_watch() -> None:
    """Start the thread that looks at the deadlines, once in a process."""
    global _watch
    with _lock:
        if _watch is None:
            _watch = threading.Thread(target=_look, name="template-limits", daemon=True)
            _watch.start()


def _forget_watch() -> None:
    """Let a forked process start a thread of its own."""
    global _watch, _lock
    _watch, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_watch)


def _look() -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        for thread, deadline in list(_deadlines.items()):
            if now > deadline and _deadlines.pop(thread, None) is not None:
                _interrupt(thread)


def _interrupt(thread: int) -> None:
    """Raise TemplateLimitError in another thread, at its next instruction of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TemplateLimitError))
