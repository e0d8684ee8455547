"""The worker: one thread that owns the pipeline, does what the scheduler says, and outlives what fails."""

__all__ = ["Room", "Runner"]

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import TypeVar

from sdxl_trt.engines import IncompatibleError, UsageError
from sdxl_trt.runtime import Pipeline
from sdxl_trt.runtime.request import StageName
from sdxl_trt.server.desk.ledger import Ledger, OnEnd
from sdxl_trt.server.desk.orders import Event, Graph
from sdxl_trt.server.desk.pieces import Piece
from sdxl_trt.server.desk.plan import Action, Predictor, Times
from sdxl_trt.server.desk.shift import Shift, proven, quietly
from sdxl_trt.server.desk.studio import Studio
from sdxl_trt.server.desk.ticket import Ticket
from sdxl_trt.server.heard import heard

T = TypeVar("T")
log = logging.getLogger("sdxl_trt.server")
Runner = Callable[[Pipeline, Graph, Ticket], Iterator[Event]]
"""What runs a graph, and yields what its readers are told; it is closed between two events if somebody stops it."""
PROBE_AGAIN = 30.0
"""Seconds between probes while the engines fail and nothing else is to be done."""
WARMING, FAILING = "the engines are not warm yet", "the latest picture for a test failed"


class Room:
    """Draws what its shifts hold, one shift after the other; `on_end` and `on_change` are called on its thread.

    `lock` guards the schedulers and the ledger. `pulse` is when the latest unit of work ended; `fault` says why no
    order should come, "" if nothing is wrong.
    """

    def __init__(self, shift: Shift, predictor: Predictor, on_end: OnEnd, on_change: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.shifts = [shift]
        self.runner: Runner | None = None
        self.on_stage: list[Callable[[str, float], None]] = []
        """Called on the worker's thread with what each stage of a piece of work took: picture, encode, swap_base, base,
        swap_refiner, refiner, load, decode; the seconds are those of all its units."""
        self.on_call: list[Callable[[str, int, int], None]] = []
        """Called on the worker's thread before each common call of a UNet: the stage, its rows in use, all its rows."""
        self.times = Times()
        """What changes of engines cost, as of the latest action."""
        self.fault = WARMING
        self.busy = False
        self.pulse = time.monotonic()
        self.ledger = Ledger(on_end)
        self._predictor = predictor
        self._on_change = on_change
        self._news = threading.Event()
        self._closing = False
        self._doubtful = True
        self._current: list[Piece] = []
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._exchanges: list[tuple[Callable[[], Shift], Future[None]]] = []
        self._thread = threading.Thread(target=self._main, name="draw", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- what the desk calls

    def add(self, pieces: Sequence[Piece]) -> None:
        """Let the pieces of an order wait in the latest shift; called under the lock."""
        shift = self.shifts[-1]
        self.ledger.enter(pieces)
        for piece in pieces:
            shift.pieces[piece.task] = piece
            shift.scheduler.add(piece.task, time.monotonic())
        self._news.set()

    def withdraw(self, ticket: Ticket) -> bool:
        """Forget an order that has not begun; return whether it had not."""
        with self.lock:
            if self.ledger.has_begun(ticket):
                return False
            for piece in self.ledger.strike(ticket):
                self._forget(piece)
            return True

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        self._news.set()

    def exchange(self, make: Callable[[], Shift]) -> Future[None]:
        """Have the thread make another shift, and draw a picture for a test with it, between two cycles.

        What is done is the result: from then on, orders go to that shift. If it fails, nothing changes, and the error
        of `make` or of the picture is the result.
        """
        done: Future[None] = Future()
        with self.lock:
            self._exchanges.append((make, done))
        self._news.set()
        return done

    def close(self, timeout: float) -> bool:
        """Do no more after the current unit of work; return whether the thread ended within `timeout` seconds."""
        self._closing = True
        self._news.set()
        self._thread.join(timeout)
        for _, done in self._exchanges:
            done.set_exception(UsageError("the server is stopping"))
        self._exchanges = []
        return not self._thread.is_alive()

    # ---------------------------------------------------------------- the thread

    def _main(self, death: BaseException | None = None) -> None:
        try:
            if death is not None:
                self._recover(death)
            with heard():  # no log holds what is said of a request: its client was told when it came
                self._serve()
        except BaseException as exc:  # noqa: BLE001 - whatever ended it, another thread goes on
            log.critical("the worker died: %s", type(exc).__name__)
            if not self._closing:
                self._thread = threading.Thread(target=self._main, args=(exc,), name="draw", daemon=True)
                self._thread.start()

    def _recover(self, death: BaseException) -> None:
        """Go on after a thread died: what it drew fails, or is drawn again alone, and the engines are loaded anew."""
        pieces, self._current = self._current, []
        self._settle(self.shifts[0], pieces, [], EngineDiedError(type(death).__name__))
        quietly(self.shifts[0].studio.free)
        self._doubtful = True

    def _serve(self) -> None:
        while not self._closing:
            if self._doubtful:
                self._check()
            self._sweep()
            self._try_exchange()
            shift, action = self._chosen()
            if action is not None:
                self._act(shift, action)
            elif len(self.shifts) > 1:
                self._change_shift()
            elif not self._news.wait(PROBE_AGAIN if self.fault else None):
                self._doubtful = True
            self._news.clear()

    def _chosen(self) -> tuple[Shift, Action | None]:
        with self.lock:
            shift = self.shifts[0]
            self.times = shift.studio.times()
            action = shift.scheduler.next(time.monotonic(), self.times)
            self._current = [shift.pieces[task] for task in action.tasks] if action is not None else []
            return shift, action

    def _act(self, shift: Shift, action: Action) -> None:
        pieces, error = self._current, None
        alive = [piece for piece in pieces if piece.early or not piece.stopped]
        self.busy, self.pulse = True, time.monotonic()
        try:
            survivors = self._done(shift, action, alive)
        except Exception as exc:  # noqa: BLE001 - it ends the orders
            log.warning("%s of %d pictures failed: %s", action.kind, len(alive), type(exc).__name__)
            survivors, error = [], exc
        self.busy = False
        self._settle(shift, alive, survivors, error)
        self._current = []
        spent, self._spent = self._spent, defaultdict(float)
        for stage, seconds in spent.items():
            for listener in self.on_stage:
                listener(stage, seconds)

    def _settle(self, shift: Shift, alive: Sequence[Piece], survivors: list[Piece], error: Exception | None) -> None:
        with self.lock:
            shift.scheduler.done(time.monotonic(), [piece.task for piece in survivors])
            if error is not None and len(alive) > 1:
                self._alone(shift, alive)
            elif error is not None:
                for piece in alive:
                    self._fail(piece, error)
        self._doubtful |= error is not None and _is_fault(error)

    def _alone(self, shift: Shift, pieces: Sequence[Piece]) -> None:
        """Draw pieces that failed together once more, each alone: only one of them may be the reason."""
        for piece in pieces:
            shift.pieces.pop(piece.task)
            piece.task, piece.job, piece.estimate, piece.solo = shift.scheduler.again(piece.task), None, None, True
            shift.pieces[piece.task] = piece

    def _sweep(self) -> None:
        """Let go of the pieces that nobody waits for; decode what is there of those that somebody interrupted."""
        with self.lock:
            for piece in self.ledger.pieces():
                if not piece.stopped or piece.early:
                    continue
                interrupted = piece.ticket.ended is None and piece.ticket.stop == "interrupted"
                if interrupted and piece.complete:
                    continue
                if interrupted and piece.estimate is not None:
                    piece.early = True
                    self.shifts[0].scheduler.finish_early(piece.task)
                else:
                    self._forget(piece)
                    self.ledger.close(piece)

    def _forget(self, piece: Piece) -> None:
        for shift in self.shifts:
            if shift.pieces.pop(piece.task, None) is not None:
                shift.scheduler.drop(piece.task)

    def _fail(self, piece: Piece, error: Exception) -> None:
        """End the order of `piece` with `error`, its other pieces too."""
        with self.lock:
            for other in (piece, *self.ledger.end(piece.ticket, "failed", error)):
                self._forget(other)

    # ---------------------------------------------------------------- actions

    def _done(self, shift: Shift, action: Action, pieces: list[Piece]) -> list[Piece]:
        """Do `action` for `pieces`; return those that go on."""
        if action.kind == "home":
            shift.studio.home()
            return []
        if not pieces:
            return []
        if action.kind == "encode":
            return self._encode(shift.studio, pieces)
        if action.kind in ("base", "refiner"):
            return self._denoise(shift.studio, "base" if action.kind == "base" else "refiner", pieces)
        draw = self._graph if action.kind == "alone" else self._decode
        draw(shift, pieces[0])
        return []

    def _unit(self, pieces: Sequence[Piece], stage: str, measured: str = "") -> float:
        """Take in that a unit of work ended now, which is `measured` under another name than its stage's, if any.

        Return its seconds.
        """
        now = time.monotonic()
        seconds, self.pulse = now - self.pulse, now
        self.ledger.spend(pieces, stage, seconds)
        self._spent[measured or stage] += seconds
        return seconds

    def _encode(self, studio: Studio, pieces: list[Piece]) -> list[Piece]:
        with self.lock:
            self.ledger.begin(pieces)
        self._on_change()
        try:
            self._read(studio, pieces)
        except Exception:
            if len(pieces) == 1:
                raise
        else:
            return [piece for piece in pieces if not piece.stopped]
        survivors = []
        for piece in pieces:
            try:
                self._read(studio, [piece])
                survivors.append(piece)
            except Exception as exc:  # noqa: BLE001 - it ends the order
                self._fail(piece, exc)
                self._doubtful |= _is_fault(exc)
        return survivors

    def _read(self, studio: Studio, pieces: Sequence[Piece]) -> None:
        began = time.monotonic()
        for step in studio.encode(pieces):
            self._unit(pieces, "encode", step.stage)
            for piece in pieces:
                self.ledger.stepped(piece, step)
        self._predictor.observe("encode", 0, (time.monotonic() - began) / len(pieces))

    def _denoise(self, studio: Studio, stage: StageName, pieces: list[Piece]) -> list[Piece]:
        shared, gone = studio.denoise(stage, pieces), set[int]()
        shared.on_call = partial(self._called, stage)
        seconds, units = defaultdict[str, float](float), defaultdict[str, int](int)
        with closing(_generator(shared.steps())) as steps:
            for number, step in steps:
                here = [piece for other, piece in enumerate(pieces) if other not in gone]
                spent = self._unit(here, step.stage, f"swap_{stage}" if step.stage == "load" else "")
                pictures = step.pictures.stop - step.pictures.start
                if step.stage == "load":
                    self._predictor.observe_load(stage, step.seconds)
                else:
                    kind = stage if step.full else f"{stage}_shallow"
                    seconds[kind], units[kind] = seconds[kind] + spent, units[kind] + pictures
                self.ledger.stepped(pieces[number], step)
                for other, piece in enumerate(pieces):
                    if piece.stopped and other not in gone:
                        gone.add(other)
                        shared.drop(other)
                if len(gone) == len(pieces):
                    break
        if (work := pieces[0].work) is not None:
            for kind, count in units.items():
                self._predictor.observe(kind, work.pixels, seconds[kind] / count)
        for number, error in shared.failed.items():
            self._fail(pieces[number], error)
            self._doubtful = True
        ended = [piece for number, piece in enumerate(pieces) if number not in gone and number not in shared.failed]
        for piece in ended:
            piece.complete = stage == "refiner" or piece.task.refiner_key is None
        return ended

    def _called(self, stage: str, used: int, rows: int) -> None:
        for listener in self.on_call:
            listener(stage, used, rows)

    def _decode(self, shift: Shift, piece: Piece) -> None:
        with closing(_generator(shift.studio.decode(piece, early=piece.early))) as steps:
            for step in steps:
                seconds = self._unit([piece], step.stage)
                if step.stage == "load":
                    self._predictor.observe_load("decode", step.seconds)
                elif piece.work is not None:
                    self._predictor.observe("decode", piece.work.pixels, seconds)
                if step.picture is not None:
                    self.ledger.drawn(piece, step)
                if piece.ticket.ended is not None or piece.ticket.stop == "cancelled":
                    break
        self.fault = ""
        self._close(piece)

    def _graph(self, shift: Shift, piece: Piece) -> None:
        with self.lock:
            self.ledger.begin([piece])
        self._on_change()
        graph = piece.ticket.order.work
        if self.runner is None or not isinstance(graph, Graph):
            raise UsageError("graphs are not served here; send a request of another API")
        began = time.monotonic()
        for event in self.runner(shift.studio.pipeline, graph, piece.ticket):
            self._unit([piece], getattr(event, "stage", "decode"))
            piece.ticket.tell(event)
            if piece.stopped:
                break
        else:
            self._predictor.observe("graph", 0, time.monotonic() - began)
        self._close(piece)

    def _close(self, piece: Piece) -> None:
        with self.lock:
            self._forget(piece)
            self.ledger.close(piece)

    # ---------------------------------------------------------------- readiness, and another pipeline

    def _check(self) -> None:
        """Draw a small picture to see whether the engines work; if not, load them anew and try once more."""
        self._doubtful, studio = False, self.shifts[0].studio
        for attempt in range(2):
            self.busy, self.pulse = True, time.monotonic()
            try:
                studio.probe()
            except BaseException as exc:  # noqa: BLE001 - the server says that it is not ready
                log.warning("a picture for a test failed: %s", type(exc).__name__)
                if attempt:
                    self.fault = FAILING
                else:
                    quietly(studio.free)
            else:
                self.fault = ""
                break
            finally:
                self.busy = False
        if not self.shifts[0].opened.done():
            self.shifts[0].opened.set_result(None)
        self._on_change()

    def _try_exchange(self) -> None:
        """Make the shift that somebody wants, if nothing is under way, and see whether it draws."""
        with self.lock:
            if not self._exchanges or len(self.shifts) > 1 or not self.shifts[0].scheduler.between_cycles():
                return
            make, done = self._exchanges.pop(0)
        self.busy, self.pulse = True, time.monotonic()
        try:
            shift = proven(self.shifts[0].studio, make)
        except BaseException as exc:  # noqa: BLE001 - who asked is told
            self._doubtful = True  # the engines in service may be unloaded
            done.set_exception(exc if isinstance(exc, Exception) else EngineDiedError(type(exc).__name__))
        else:
            self._append(shift)
            done.set_result(None)
        finally:
            self.busy = False

    def _append(self, shift: Shift) -> None:
        """Let orders go to a shift that has drawn."""
        shift.opened.set_result(None)
        with self.lock:
            self.shifts.append(shift)
            shift.cold = self.shifts[0].scheduler.busy()
        if shift.cold:  # the engines of both may not fit
            quietly(shift.studio.free)

    def _change_shift(self) -> None:
        """Let go of a shift that has nothing left; the next one has drawn already."""
        with self.lock:
            if self.shifts[0].scheduler.busy():
                return
            old = self.shifts.pop(0)
            self.fault, self._doubtful = "", self.shifts[0].cold
        quietly(old.studio.close if old.owned else old.studio.free)
        self._on_change()


class EngineDiedError(RuntimeError):
    """The worker's thread died while it drew."""


def _generator(steps: Iterator[T]) -> Generator[T, None, None]:
    """Return `steps` as a generator, which can be closed before its end."""
    yield from steps


def _is_fault(error: Exception) -> bool:
    """Return whether `error` says something of the engines, and not only of what was asked."""
    return not isinstance(error, UsageError | IncompatibleError)
