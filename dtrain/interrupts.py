"""Owns Ctrl-C and SIGTERM while a verb runs: they become something that the code that waits looks at.

Python raises KeyboardInterrupt wherever it happens to be. In a callback of native code, a `__del__` or a weakref's
callback it ends there, and the job goes on. So here a signal is noted as well as raised; what was swallowed is seen at
the next look. Handlers that others have installed are left alone, and nothing is done outside the main thread.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a verb as Ctrl-C does."""


class Interrupts:
    """Ctrl-C and SIGTERM within `with`, which goes round a whole verb; verbs within verbs may share one or not.

    A signal raises KeyboardInterrupt, or Terminated, where it comes: except where somebody looks for it within moments
    (`watched`) or ends in order (`graceful`). None is lost: one that nobody has honoured is raised at the end of the
    verb, after which the handlers are those of before.

    Example:
        >>> with interrupts, interrupts.watched():
        ...     while not done(timeout=0.1):
        ...         interrupts.check()
    """

    requested: bool
    """Whether somebody wants the verb to end. Kept until the next verb."""

    def __init__(self) -> None:
        self.requested = False
        self._kind: type[KeyboardInterrupt] = KeyboardInterrupt
        self._due = False
        self._spares_one = False
        self._watched = False
        self._depth = 0
        self._replaced: dict[int, Any] = {}

    def check(self) -> None:
        """Called by whoever waits in a loop.

        Raises:
            KeyboardInterrupt: one is due, for the first time or because it was swallowed.
        """
        if self._due and _in_main_thread():
            raise self._kind

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, `check` is called a few times a second: a signal is only noted, unless another is due already."""
        if not _in_main_thread():
            yield
            return
        with self:
            outer, self._watched = self._watched, True
            try:
                yield
                self.check()
            finally:
                self._watched = outer

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Inside, the first signal only sets `requested`; another is due at once, and the first one afterwards."""
        if not _in_main_thread():
            yield
            return
        with self:
            outer, self._spares_one = self._spares_one, True
            try:
                yield
            finally:
                has_spared = not self._spares_one
                self._spares_one = outer and not has_spared
                self._due |= has_spared and not outer

    def __enter__(self) -> Self:
        if not _in_main_thread():
            return self
        if self._depth == 0:
            self.requested = self._due = self._spares_one = False
            self._watched = True  # a signal in the middle of this must not leave handlers behind
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if _is_nobodys_own(handler):
                    self._replaced[number] = handler
                    signal.signal(number, self._note)
            self._depth = 1
            self._watched = False
        else:
            self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not _in_main_thread():
            return
        if self._depth > 1:
            self._depth -= 1
            return
        self._watched = True
        for number, handler in self._replaced.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._replaced.clear()
        self._depth = 0
        if kind is None or issubclass(kind, Exception):
            self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self._spares_one:
            self._spares_one = False
            return
        again, self._due = self._due, True
        if again or not self._watched:
            raise self._kind


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Goes round what installs handlers of its own, as `ray.init` does: in a verb they come into force after it."""
    if not _in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            interrupts, installed = _interrupts_of(handler), signal.getsignal(number)
            if interrupts is not None and installed != handler:
                interrupts._replaced[number] = installed
                signal.signal(number, handler)


def _is_nobodys_own(handler: Any) -> bool:
    """Whether a handler may be replaced: Python's default ones, Ray's, and those of a verb outside of this one."""
    if handler in (signal.SIG_DFL, signal.default_int_handler) or _interrupts_of(handler) is not None:
        return True
    return (getattr(handler, "__module__", None) or "").startswith("ray.")


def _interrupts_of(handler: Any) -> Interrupts | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Interrupts) else None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
