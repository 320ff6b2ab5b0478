"""Claims about Ctrl-C and SIGTERM: none is lost, none cuts short what must end in order, and all is as before then."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import models
import pytest
from models import blobs, make_classifier
from test_failures import QUIET, nothing_is_left, wait_until

import dtrain
from dtrain import fit_run, rooms
from dtrain.interrupts import Interrupts, Terminated, handlers_kept

cloudpickle.register_pickle_by_value(models)

BOTH = pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["Ctrl-C", "SIGTERM"]
)
Handler = Callable[[int, Any], Any] | int | None


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """Python's own handlers, and after the test those of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> tuple[Handler, Handler]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def swallowed(number: int) -> None:
    """A signal that comes where exceptions end, such as in a `__del__`."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)


# When it is raised ----------------------------------------------------------------------------------------------------


@BOTH
def test_a_signal_is_raised_where_it_comes_and_the_old_handlers_are_put_back(
    number: int, kind: type[BaseException]
) -> None:
    before, interrupts, after = handlers(), Interrupts(), []
    with pytest.raises(KeyboardInterrupt) as caught, interrupts:
        signal.raise_signal(number)
        after.append("this")
    assert caught.type is kind and after == [] and interrupts.requested
    assert handlers() == before == (signal.default_int_handler, signal.SIG_DFL)


@BOTH
def test_a_swallowed_signal_is_raised_at_the_next_look(number: int, kind: type[BaseException]) -> None:
    interrupts = Interrupts()
    with pytest.raises(kind), interrupts:
        swallowed(number)
        with interrupts.watched():
            interrupts.check()
            pytest.fail("it was not raised")


@BOTH
def test_a_signal_that_nobody_looks_for_is_raised_at_the_end_of_the_verb(
    number: int, kind: type[BaseException]
) -> None:
    with pytest.raises(kind), Interrupts():
        swallowed(number)
    with pytest.raises(kind) as caught, Interrupts():
        swallowed(number)
        raise ValueError("of something else")
    assert isinstance(caught.value.__context__, ValueError)


def test_where_somebody_looks_a_first_signal_waits_for_the_look_and_a_second_one_does_not() -> None:
    interrupts, done = Interrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts, interrupts.watched():
        signal.raise_signal(signal.SIGINT)
        done.append("not swallowed")
        interrupts.check()
        done.append("never")
    assert done == ["not swallowed"]
    with pytest.raises(KeyboardInterrupt), interrupts, interrupts.watched():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["not swallowed"]


def test_a_signal_after_the_last_look_is_raised_when_the_wait_ends() -> None:
    interrupts, done = Interrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts:
        with interrupts.watched():
            signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == []


def test_a_graceful_end_is_not_cut_short_by_the_first_signal_but_by_the_second() -> None:
    interrupts, done = Interrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts, interrupts.graceful():
        assert not interrupts.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
        with interrupts.watched():
            interrupts.check()
        done.append("checkpoint")
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["checkpoint"]


def test_the_first_signal_is_due_after_a_graceful_end() -> None:
    interrupts, done = Interrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts:
        with interrupts.graceful():
            signal.raise_signal(signal.SIGINT)
        done.append("checkpoint")
        interrupts.check()
        done.append("never")
    assert done == ["checkpoint"]


@pytest.mark.parametrize("signals_before", [0, 1])
def test_what_is_closed_within_a_graceful_end_is_closed_to_its_end(signals_before: int) -> None:
    """There the first signal of all still only asks; a second one is due once all is closed."""
    interrupts, done = Interrupts(), []
    due = pytest.raises(KeyboardInterrupt) if signals_before else contextlib.nullcontext()
    with contextlib.suppress(KeyboardInterrupt), interrupts, interrupts.graceful():
        for _ in range(signals_before):
            signal.raise_signal(signal.SIGINT)
        with interrupts.graceful():
            signal.raise_signal(signal.SIGINT)
            done.append("closed")
        with due:
            interrupts.check()
    assert done == ["closed"] and interrupts.requested


def test_a_new_verb_knows_nothing_of_the_last_ones_signals() -> None:
    interrupts = Interrupts()
    with contextlib.suppress(KeyboardInterrupt), interrupts:
        signal.raise_signal(signal.SIGINT)
    with interrupts:
        assert not interrupts.requested
        interrupts.check()


# Whose handlers -------------------------------------------------------------------------------------------------------


def test_handlers_of_the_users_own_are_left_alone() -> None:
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    interrupts = Interrupts()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, own)
    with interrupts, interrupts.watched(), interrupts.graceful():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGINT, signal.SIGTERM] and not interrupts.requested and handlers() == (own, own)


def test_a_handler_that_is_installed_in_a_verb_stays() -> None:
    with Interrupts():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert handlers() == (signal.default_int_handler, signal.SIG_IGN)


def test_outside_the_main_thread_nothing_is_done() -> None:
    before, seen = handlers(), []

    def work() -> None:
        interrupts = Interrupts()
        with interrupts, interrupts.watched(), interrupts.graceful():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("shared", [True, False], ids=["one for both", "one each"])
def test_a_verb_within_a_verb_ends_both_and_leaves_the_outer_ones_handlers(shared: bool) -> None:
    outer = Interrupts()
    inner = outer if shared else Interrupts()
    before = handlers()
    with pytest.raises(KeyboardInterrupt), outer:
        of_outer = handlers()
        with inner:
            pass
        assert handlers() == of_outer != before
        with inner:
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_what_a_library_installs_in_a_verb_comes_into_force_after_it() -> None:
    def of_ray(number: int, frame: Any) -> None:
        raise SystemExit(number)

    of_ray.__module__ = "ray._private.worker"
    interrupts = Interrupts()
    with pytest.raises(Terminated), interrupts:
        with handlers_kept():
            signal.signal(signal.SIGTERM, of_ray)
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == (signal.default_int_handler, of_ray)
    with pytest.raises(Terminated), interrupts:  # and the next verb puts it aside again
        signal.raise_signal(signal.SIGTERM)
    with handlers_kept():  # outside of verbs it is as ever
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert handlers() == (signal.default_int_handler, signal.SIG_DFL)


# On workers -----------------------------------------------------------------------------------------------------------


class SwallowedWhileShowing(fit_run.ProgressBar):
    """A bar under which one SIGTERM ends where nobody hears of it."""

    sent = False

    def update(self, step: int, *args: Any, **kwargs: Any) -> None:
        if not self.sent:
            self.sent = True
            swallowed(signal.SIGTERM)


def test_one_signal_ends_a_fit_and_one_at_the_end_leaves_nothing_behind(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_removal(placement: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(placement)

    remove = rooms.remove_placement_group
    monkeypatch.setattr(fit_run, "ProgressBar", SwallowedWhileShowing)
    x, y = blobs(64)
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as caught, dtrain.Trainer(make_classifier, num_workers=2, **QUIET) as trainer:
        with pytest.raises(Terminated):
            trainer.fit(x, y, epochs=1_000_000, verbose=0)
        assert handlers() == before
        assert len(trainer.predict(x, verbose=0)) == len(x)  # the workers live
        pids = {worker.pid for worker in trainer.workers}
        monkeypatch.setattr(rooms, "remove_placement_group", interrupted_removal)
    assert caught.type is KeyboardInterrupt and handlers() == before
    wait_until(lambda: nothing_is_left(pids))
