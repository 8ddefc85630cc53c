"""Frames in, labels out: everything that a camera application needs."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import BackendError, BundleError, DualLoraEdgeError, SwapError
from duallora_edge.runtime.backends.contract import ENGINE_BATCH
from duallora_edge.runtime.backends.ladder import Backend, Rung, open_backend
from duallora_edge.runtime.bundle import Bundle, Outputs
from duallora_edge.runtime.field.lessons import Lessons
from duallora_edge.runtime.model import Model
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.preprocess import Pixels, Preprocessing, cut, to_rgb
from duallora_edge.runtime.process_memory import give_back_memory
from duallora_edge.runtime.sources.frame import Frame
from duallora_edge.runtime.trial import Opening, Trial

# Answers that a new bundle gives before the old one is let go.
PROBATION = 30
# Share of these by which the new bundle may call more frames novel than the old one.
MORE_NOVEL = 0.2


@dataclass(frozen=True, eq=False)
class Prepared:
    """A frame ``rgb`` and the ``image`` ``uint8 [S, S, 3]`` that ``preprocessing`` made of it in ``milliseconds``."""

    rgb: Pixels
    image: Pixels
    preprocessing: Preprocessing
    milliseconds: float


@dataclass(frozen=True)
class Swap:
    """A change of bundles.

    Attributes:
        old: Name and version of the old bundle.
        new: Name and version of the new bundle.
        state: ``"probation"``, ``"confirmed"``, ``"returned"`` (to the old bundle) or ``"refused"``.
        backend_before: Backend and precision of the old bundle, such as ``"tensorrt in fp16"``.
        backend_after: The same of the new bundle; empty if it was never opened.
        reason: Why the new bundle was given up or refused.
    """

    old: str
    new: str
    state: str
    backend_before: str
    backend_after: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"swapped '{self.old}' ({self.backend_before}) for '{self.new}' ({self.backend_after})"
            if self.state in ("probation", "confirmed")
            else f"{self.state}: '{self.new}', '{self.old}' answers ({self.backend_before}): {self.reason}"
        )


@dataclass(frozen=True)
class Health:
    """How a classifier is doing.

    Attributes:
        status: ``"ok"``, ``"probation"`` (a bundle was swapped in and the old one still stands by), ``"loading"`` (the
            old one was dropped first; calls wait) or ``"failed"`` (there is no model; calls raise).
        bundle: Name and version of the bundle that answers.
        bundle_path: Its folder.
        backend: What runs it.
        precision: The precision in which it runs.
        answers: Number of frames answered.
        failures: Number of calls that raised `BackendError`.
        last_error: The last of these errors.
        idle_s: Seconds since the last answer, None before the first.
        swaps: How often changes of bundles ended in each state.
        last_swap: The last change of bundles.
        taught: The classes that were taught beside those of the bundle, and answer.
        taught_error: Why classes that were taught cannot answer.
    """

    status: str
    bundle: str
    bundle_path: str
    backend: str
    precision: str
    answers: int
    failures: int
    last_error: str | None
    idle_s: float | None
    swaps: dict[str, int]
    last_swap: Swap | None
    taught: tuple[str, ...] = ()
    taught_error: str | None = None

    @property
    def taught_line(self) -> str:
        """What was taught, as one line for a log."""
        if self.taught_error:
            return f"taught classes cannot answer: {self.taught_error}"
        return f"taught classes: {', '.join(self.taught) or 'none'}"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


@dataclass
class _Probation:
    """The first answers of ``new``, after which ``old`` is released (a `Bundle` if its model was dropped)."""

    swap: Swap
    new: Model
    old: Model | Bundle
    budget_ms: float | None
    answers: int
    times_ms: list[float] = field(default_factory=list)
    novel: list[tuple[bool, bool]] = field(default_factory=list)

    def compare(self, images: Pixels, predictions: Sequence[Prediction]) -> None:
        """Note which frames the new bundle and the old one call novel, where both are loaded and can tell."""
        if not isinstance(self.old, Model) or len(self.novel) >= self.answers:
            return
        with suppress(BackendError):
            for new, old in zip(predictions, self.old.predict(images, [0.0] * len(images)), strict=True):
                if new.is_novel is not None and old.is_novel is not None:
                    self.novel.append((new.is_novel, old.is_novel))

    def unfit(self) -> str:
        """Why the new bundle is not good after all its answers, or nothing."""
        new, old = (sum(each) for each in zip(*self.novel, strict=True)) if self.novel else (0, 0)
        if new - old > MORE_NOVEL * len(self.novel):
            return (
                f"{new} of its first {len(self.novel)} answers are novel, {old} of those of the old bundle on the same "
                "frames"
            )
        return self.over_budget()

    def over_budget(self) -> str:
        """Why the new bundle is too slow after all its answers, or nothing."""
        p90 = float(np.percentile(self.times_ms, 90))
        if self.budget_ms is None or p90 <= self.budget_ms:
            return ""
        return f"the p90 of its first {len(self.times_ms)} answers is {p90:.1f} ms, the budget {self.budget_ms:g} ms"


class Classifier:
    """A bundle that runs on a backend. Several threads may call one classifier, even while a bundle is swapped in."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        color: str = "rgb",
        reopen: Callable[[Bundle], Backend] = open_backend,
        trial: Trial | None = None,
        taught: Path | None = None,
    ) -> None:
        """Serve an open bundle; applications use `load`.

        Args:
            bundle: The bundle to serve.
            backend: What runs it.
            color: Channel order of arrays, ``"rgb"`` or ``"bgr"``.
            reopen: Opens the backend of a bundle that is swapped in.
            trial: Tries a bundle before it is swapped in; None to do without.
            taught: Folder of the classes that are taught, as for `load`.

        Raises:
            ValueError: ``color`` is neither of these.
        """
        if color not in ("rgb", "bgr"):
            raise ValueError(f"color must be 'rgb' or 'bgr', not {color!r}")
        self._color = color
        self._reopen = reopen
        self._trial = trial
        self._swapping = threading.Lock()  # one swap at a time
        self._changed = threading.Condition()  # guards everything below
        self._lessons = Lessons(taught)
        self._model = Model(bundle.without_contents, backend)
        self._lessons.apply(self._model, bundle)
        self._calls: Counter[Model] = Counter()  # in progress
        self._loading = False
        self._broken: str | None = None
        self._probation: _Probation | None = None
        self._swap: Swap | None = None
        self._swaps: Counter[str] = Counter()
        self._answers = self._failures = 0
        self._last_error: str | None = None
        self._answered: float | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        color: str = "rgb",
        build: bool = False,
        trial: bool = True,
        taught: str | Path | None = None,
    ) -> Classifier:
        """Open and verify a bundle, and start the best backend that answers its golden images correctly.

        The arguments also apply to bundles that are swapped in later.

        Args:
            path: The folder of the bundle.
            backend: ``"auto"``, or the name of the best backend to try: ``"tensorrt"``, ``"cuda"`` or ``"cpu"``.
            threads: CPU threads for one inference, by default ONNX Runtime's choice (the physical cores).
            strict: A fallback is an error. With ``"auto"``, only a backend that is installed and fails counts as one;
                with a named backend, any other backend does. So does a node that ONNX Runtime leaves to the CPU.
            color: Channel order of arrays, ``"rgb"`` or ``"bgr"`` (OpenCV); a `Frame` of a source is always RGB.
            build: Build a missing TensorRT engine, which takes minutes on a device.
            trial: Try a bundle that was never loaded on this machine in a child process first, so that it cannot crash
                this one.
            taught: A folder with a folder of images for each class that was taught on this machine. `teach` adds to it;
                without it, taught classes are forgotten when the process ends.

        Returns:
            The classifier, ready to answer.

        Raises:
            BundleError: The bundle is missing, altered or damaged.
            BackendError: No backend works, or a fallback happened with ``strict``.
            ValueError: ``color`` is unknown.
        """
        opening = Opening(backend, threads, strict, build)
        tried = Trial(opening) if trial else None
        root = Path(path).resolve()  # a link may point elsewhere later
        with _passed(tried, root) as (bundle, _):
            classifier = cls(bundle, opening(bundle), color, opening, tried, Path(taught) if taught else None)
        del bundle
        give_back_memory(collect=False)  # reading a model takes twice its size
        return classifier

    @property
    def bundle(self) -> Bundle:
        """The bundle that answers."""
        return self._model.bundle

    @property
    def backend(self) -> Backend:
        """What runs the model, and why nothing better is used."""
        return self._model.backend

    @property
    def max_batch(self) -> int:
        """How many frames are worth waiting for each other: what the model takes in one run, 1 on a CPU.

        On a CPU a batch takes as long as its frames one after the other (benchmarks/RUNTIME.md), and the first of them
        would wait for the last.
        """
        model = self._model
        on_cpu = model.backend.name == "cpu"
        return 1 if on_cpu else model.bundle.manifest.batch or ENGINE_BATCH

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of `Prediction.probabilities`; taught ones stand at the end."""
        model = self._model
        return model.names(model.taught)[0]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks; that of taught classes stands at the end."""
        model = self._model
        return model.names(model.taught)[1]

    @property
    def taught(self) -> tuple[str, ...]:
        """The names of the classes that were taught beside those of the bundle."""
        taught = self._model.taught
        return () if taught is None else taught.classes

    def __call__(self, frame: npt.ArrayLike | Frame) -> Prediction:
        """Classify one frame.

        Args:
            frame: A `Frame`, or an array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]``, uint8 or uint16.

        Returns:
            What the model says about it.

        Raises:
            DataError: ``frame`` is not a frame.
            BackendError: The device failed.
        """
        return self.batch([frame])[0]

    def batch(self, frames: Sequence[npt.ArrayLike | Frame]) -> list[Prediction]:
        """Classify several frames in one inference.

        Args:
            frames: Frames as for a single call; they may differ in size.

        Returns:
            One prediction per frame, in the same order.

        Raises:
            DataError: One of them is not a frame.
            BackendError: The device failed.
        """
        return self.answer([self.prepare(frame) for frame in frames])

    def crops(self, frame: npt.ArrayLike | Frame, boxes: npt.ArrayLike) -> list[Prediction]:
        """Classify parts of a frame, such as what a detector found, in one inference.

        Args:
            frame: A frame as for a call.
            boxes: Pixels ``[N, 4]`` of left, top, right and bottom, as ``Detections.xyxy`` of supervision and
                ``result.boxes.xyxy.cpu().numpy()`` of Ultralytics. What lies beyond the frame is left out.

        Returns:
            One prediction per box, in the same order.

        Raises:
            DataError: ``frame`` is not a frame, ``boxes`` is not such an array, or a box is empty or outside.
            BackendError: The device failed.
        """
        parts = cut(self._rgb(frame), boxes)
        return self.answer([self._prepare(part, time.perf_counter()) for part in parts])

    def prepare(self, frame: npt.ArrayLike | Frame) -> Prepared:
        """The first half of a call, for a separate thread: bring a frame to the size of the model.

        Args:
            frame: A frame as for a call.

        Returns:
            What `answer` takes.

        Raises:
            DataError: ``frame`` is not a frame.
        """
        start = time.perf_counter()
        return self._prepare(self._rgb(frame), start)

    def _rgb(self, frame: npt.ArrayLike | Frame) -> Pixels:
        return frame.pixels if isinstance(frame, Frame) else to_rgb(frame, self._color)

    def _prepare(self, rgb: Pixels, start: float) -> Prepared:
        preprocessing = self._model.bundle.manifest.preprocessing
        image = preprocessing(rgb)
        return Prepared(rgb, image, preprocessing, 1000 * (time.perf_counter() - start))

    def answer(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        """The second half of a call: run the model on prepared frames.

        Args:
            prepared: What `prepare` returned. A frame that was prepared for a former bundle of another image size is
                prepared again.

        Returns:
            One prediction per frame, in the same order.

        Raises:
            BackendError: The device failed.
        """
        if not prepared:
            return []
        while True:
            predictions: list[Prediction] = []
            failure: BackendError | None = None
            with self._borrowed() as model:
                images, probation = _images(model, prepared), self._probation
                try:
                    predictions = model.predict(images, [item.milliseconds for item in prepared])
                except BackendError as error:
                    failure = error
                if predictions and probation is not None and probation.new is model:
                    probation.compare(images, predictions)
            changed, returning = self._note(model, predictions, failure)
            if failure is not None and not changed:
                raise failure
            # An error holds the frames in which it happened, and they hold the model, whose memory is wanted now.
            del model, failure, probation
            if returning is not None:
                self._go_back(returning)
            if predictions:
                return predictions

    def teach(self, name: str, frames: Sequence[npt.ArrayLike | Frame]) -> int:
        """Teach a class that the bundle does not know, or add frames of one that was taught; calls go on meanwhile.

        The model stays as it is: the class gets a mean of features beside those of the bundle's classes, so that
        probabilities and novelty are of all classes together. It is taught again to a bundle that is swapped in, unless
        that one knows it. One frame is enough to find it now and then, ten are better.

        Args:
            name: The new class.
            frames: Frames as for a call, from one to 200.

        Returns:
            The number of frames on which the class rests now.

        Raises:
            DataError: The bundle knows the name, it cannot be used, or the frames are none or too many.
            BundleError: The bundle cannot be taught, or was replaced on the disk since it was loaded.
            BackendError: The device failed.
            OSError: The frames cannot be kept in the folder of taught classes.
        """
        pixels = [self._rgb(frame) for frame in frames]
        with self._swapping, self._borrowed() as model:
            return self._lessons.add(model, name, pixels)

    def unteach(self, name: str) -> None:
        """Forget a class that was taught; what the bundle answers is then as before, bit for bit.

        Args:
            name: The class.

        Raises:
            DataError: No such class was taught, or its folder holds images that were put there otherwise.
        """
        with self._swapping, self._borrowed() as model:
            self._lessons.remove(model, name)

    def refresh_taught(self) -> bool:
        """Take over what changed in the folder of taught classes, as another process teaches one.

        Returns:
            Whether something had changed; `health` tells what answers now.
        """
        with self._swapping:
            if not self._lessons.has_changed:
                return False
            with self._borrowed() as model:
                self._lessons.apply(model)
            return True

    def swap(
        self,
        path: str | Path,
        budget_ms: float | None = None,
        stop_first: bool = False,
        probation: int = PROBATION,
        allow_slower: bool = False,
        cancel: threading.Event | None = None,
    ) -> Swap:
        """Serve another bundle from now on, without a pause; other threads may go on calling meanwhile.

        Unless it was loaded on this machine before, the new bundle is tried in a child process. Then it is verified,
        loaded and checked against its golden images while the old one still answers. The old one stands by for the next
        ``probation`` answers. If the new one fails during these, is too slow, or calls many more of the same frames
        novel than the old one, which is asked as well, the old one takes over again, starting with the frame that
        failed; `health` tells. A swap during the probation of another one ends that probation.

        Args:
            path: The folder of the new bundle.
            budget_ms: Give the new bundle up if the 90th percentile of its inference takes longer during probation.
            stop_first: For a device that cannot hold two models: drop the old one first. Calls wait until the new one
                is loaded, or the old one is loaded again from its folder, which must still be there.
            probation: For how many answers the old bundle stands by.
            allow_slower: Accept a bundle that runs on a lower rung of the ladder than the old one, for example because
                its engine is not built yet.
            cancel: Ends a trial when it is set.

        Returns:
            What happened, once no call uses the old bundle any more.

        Raises:
            SwapError: The new bundle is not fit to answer; the old one still answers.
            ValueError: ``probation`` is negative.
        """
        if probation < 0:
            raise ValueError(f"probation must not be negative, not {probation}")
        with self._swapping:
            dropped: Bundle | None = None
            running = self._model.backend.rung
            swap = Swap(str(self._model), str(path), "probation", str(running))
            try:
                root = Path(path).resolve()
                peeked = Bundle.peek(root)
                swap = replace(swap, new=str(peeked))
                with self._changed:
                    self._end_probation()  # two models at a time are enough
                if stop_first:
                    dropped = self._drop()
                new = self._load(root, None if allow_slower else running, cancel)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold what was read, whose memory is wanted now
                if dropped is not None:
                    self._go_back(dropped)
                if not isinstance(error, (DualLoraEdgeError, OSError, MemoryError)):
                    raise
                reason = str(error) or type(error).__name__
                give_back_memory()
                with self._changed:
                    self._end(replace(swap, state="refused", reason=reason))
                goes_on = "nothing answers any more" if self._broken else f"'{swap.old}' goes on answering"
                raise SwapError(f"{path} cannot be swapped in, {goes_on}: {reason}") from error
            swap = replace(swap, backend_after=str(new.backend.rung))
            swap = self._serve(swap, new, dropped, budget_ms, probation)
            give_back_memory()
            return swap

    def _load(self, root: Path, lowest: Rung | None, cancel: threading.Event | None) -> Model:
        """The model of a bundle that passed its trial, on no lower rung than ``lowest``."""
        with _passed(self._trial, root, cancel) as (bundle, expected):
            if expected is not None:
                _check_rung(expected, lowest, root)
            backend = self._reopen(bundle)
            _check_rung(backend.rung, lowest, root)
            model = Model(bundle.without_contents, backend)
            self._lessons.apply(model, bundle)
            return model

    def _serve(self, swap: Swap, new: Model, dropped: Bundle | None, budget_ms: float | None, probation: int) -> Swap:
        """Let ``new`` answer from now on, and wait for the calls that still use the old one."""
        with self._changed:
            if dropped is None:
                self._changed.wait_for(lambda: not self._loading)  # while a bundle before this one is given up
            before = self._model
            self._model, self._broken, self._swap = new, None, swap
            if probation:
                self._probation = _Probation(swap, new, dropped or before, budget_ms, probation)
            else:
                self._end(replace(swap, state="confirmed"))
            self._set_loading(False)
            self._changed.wait_for(lambda: before not in self._calls)
            return swap

    def health(self) -> Health:
        """How the classifier is doing; returns at once, even while a bundle is loading.

        Returns:
            A snapshot.
        """
        with self._changed:
            standing = "loading" if self._loading else "probation" if self._probation else "ok"
            return Health(
                status="failed" if self._broken else standing,
                bundle=str(self._model),
                bundle_path=str(self._model.bundle.path),
                backend=self._model.backend.name,
                precision=self._model.backend.precision,
                answers=self._answers,
                failures=self._failures,
                last_error=self._broken or self._last_error,
                idle_s=None if self._answered is None else time.monotonic() - self._answered,
                swaps=dict(self._swaps),
                last_swap=self._swap,
                taught=() if self._model.taught is None else self._model.taught.classes,
                taught_error=self._lessons.error,
            )

    @contextmanager
    def _borrowed(self) -> Iterator[Model]:
        model = self._borrow()
        try:
            yield model
        finally:
            self._give_back(model)

    def _borrow(self) -> Model:
        """The model that answers now; a swap does not let go of it before it is given back."""
        with self._changed:
            if self._loading:
                self._changed.wait_for(lambda: not self._loading)
            if self._broken is not None:
                raise BackendError(self._broken)
            self._calls[self._model] += 1
            return self._model

    def _give_back(self, model: Model) -> None:
        with self._changed:
            self._calls[model] -= 1
            if not self._calls[model]:
                del self._calls[model]
                self._changed.notify_all()

    def _note(
        self, model: Model, predictions: list[Prediction], failure: BackendError | None
    ) -> tuple[bool, Model | Bundle | None]:
        """Count a call. Returns whether to ask another model, and what to return to if the probation failed."""
        with self._changed:
            if failure is not None:
                self._failures += 1
                self._last_error = str(failure)
            self._answers += len(predictions)
            self._answered = time.monotonic() if predictions else self._answered
            probation = self._probation
            if probation is None or probation.new is not model:
                return self._model is not model, None
            probation.times_ms += [prediction.timings.infer_ms for prediction in predictions]
            if failure is None and len(probation.times_ms) < probation.answers:
                return False, None
            reason = str(failure) if failure is not None else probation.unfit()
            self._end_probation(reason)
            if failure is not None and self._trial is not None:
                refuse = threading.Thread(target=self._trial.refuse, args=(model.bundle, reason), daemon=True)
                refuse.start()  # not in this thread, because a camera waits for it
            if not reason:
                return False, None
            self._set_loading(True)
            self._model = _without_backend(model)
            return True, probation.old

    def _end_probation(self, reason: str = "") -> None:
        """End the probation, if there is one; with a ``reason``, because the new bundle failed."""
        if self._probation is not None:
            self._end(replace(self._probation.swap, state="returned" if reason else "confirmed", reason=reason))
            self._probation = None
            # Not in this thread, because a camera waits for it.
            threading.Thread(target=give_back_memory, name="duallora-edge memory", daemon=True).start()

    def _end(self, swap: Swap) -> None:
        self._swap = swap
        self._swaps[swap.state] += 1

    def _set_loading(self, loading: bool) -> None:
        self._loading = loading
        self._changed.notify_all()

    def _drop(self) -> Bundle:
        """Make new calls wait, and release the model when the last running call has ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            self._set_loading(True)
            self._changed.wait_for(lambda: not self._calls)
            self._model = _without_backend(self._model)
        give_back_memory()  # before the new bundle asks for it
        return self._model.bundle

    def _go_back(self, old: Model | Bundle) -> None:
        """Serve ``old`` again, which is loaded from its folder where it had to be dropped."""
        broken = None
        model = old if isinstance(old, Model) else self._model
        if isinstance(old, Bundle):
            with self._changed:
                self._changed.wait_for(lambda: not self._calls)
            give_back_memory()
            try:
                again = Bundle.open(old.path)
                if again.digest != old.digest:
                    raise BundleError(f"{old.path} now holds another bundle; keep the old one beside the new one.")
                model = Model(again.without_contents, self._reopen(again))
                self._lessons.apply(model, again)
            except (DualLoraEdgeError, OSError, MemoryError) as error:
                broken = f"No model is left to answer: the new one failed, and the old one cannot be loaded: {error}"
        else:
            self._lessons.apply(model)  # what was taught meanwhile
        with self._changed:
            self._model, self._broken = model, broken
            self._set_loading(False)


@contextmanager
def _passed(
    trial: Trial | None, root: Path, cancel: threading.Event | None = None
) -> Iterator[tuple[Bundle, Rung | None]]:
    """The whole bundle at ``root``, after its trial, to be loaded in the block; and the rung that the trial found."""
    if trial is None:
        yield Bundle.open(root), None
        return
    peeked = Bundle.peek(root)
    with trial.passed(peeked, cancel) as rung:
        yield Bundle.open(root, tried=peeked.digest), rung


def _check_rung(rung: Rung, lowest: Rung | None, root: Path) -> None:
    """Raise `BackendError` for a rung below ``lowest``."""
    if lowest is not None and rung.is_below(lowest):
        raise BackendError(
            f"it would run on {rung}, which is slower than {lowest}; build its engine with 'duallora-edge build "
            f"{root}' (or 'run --build'), or allow it with 'allow_slower' ('run --allow-slower')"
        )


def _images(model: Model, prepared: Sequence[Prepared]) -> Pixels:
    """``uint8 [N, S, S, 3]`` for a model; what was prepared for one of another image size is prepared again."""
    wanted = model.bundle.manifest.preprocessing
    images = [item.image if item.preprocessing == wanted else wanted(item.rgb) for item in prepared]
    return images[0][None] if len(images) == 1 else np.stack(images)  # one image need not be copied


def _without_backend(model: Model) -> Model:
    """The description of a model, without the model itself."""

    def infer(images: Pixels) -> Outputs:
        raise BackendError("The model was replaced by another one; call again.")

    return Model(model.bundle, replace(model.backend, infer=infer))
