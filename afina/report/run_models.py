"""The two models of a run, before training and the best one after it, and the run's rows, found again from its folder.

Whatever has moved or changed since is an AfinaError that says so: the report leaves out what needs it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from afina.engine.lora import Adapter, set_adapter
from afina.engine.run_inputs import read_data
from afina.engine.weights import load_model, new_model, read_config
from afina.errors import AfinaError, DataError, WeightsError
from afina.loaders.data.dataset import TokenSet
from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import find_base, is_adapter
from afina.report.budget import Budget, reading_seconds
from afina.report.facts import RunFacts

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.data.dataset import Data
    from afina.loaders.text.tokenizer import Tokenizer

T = TypeVar("T")
BOTH_SECONDS = 10.0  # of reading (2 GB): up to so much, both models of a run are held at once


class RunModels:
    """``before`` and ``after`` of a run, read when they are asked for.

    An adapter's base is read once, and asked with and without it. Of two whole models that are large only one is held;
    ``both`` asks in an order that saves reading.
    """

    def __init__(self, facts: RunFacts, budget: Budget, device: str | None) -> None:
        self.facts, self.config, self.budget = facts, facts.config, budget
        self.device = device or self.config.device
        self._held: dict[str, GPT] = {}
        self._last = "before"
        self._adapter: Adapter | None = None
        self._tokenizer: Tokenizer | None = None
        self._data: Data | None = None

    @property
    def adapted(self) -> bool:
        """Whether the run trained an adapter."""
        return is_adapter(self.best)

    @property
    def best(self) -> Path:
        """The folder of the best model. Raises WeightsError where the run has none yet."""
        return resolve(self.facts.folder)

    @property
    def base(self) -> Path | None:
        """The files of the model before training; None for a random start, which has none. Raises AfinaError."""
        if self.config.init == "random":
            return None
        return find_base(self.best)[1] if self.adapted else resolve(str(self.config.model))

    @property
    def max_positions(self) -> int:
        return read_config(find_base(self.best)[1] if self.adapted else self.best)[0].max_positions

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; where its source has moved, the copy beside the best model."""
        if self._tokenizer is None:
            try:
                self._tokenizer = load_tokenizer(str(self.config.tokenizer or self.config.model))
            except AfinaError:
                self._tokenizer = load_tokenizer(str(self.best))
        return self._tokenizer

    @property
    def dev(self) -> TokenSet:
        """The run's dev rows. Raises DataError where they are not what the run began with."""
        return self.data.dev

    @property
    def data(self) -> Data:
        if self._data is None:
            data = read_data(self.config, self.tokenizer, progress=False)
            if data.fingerprint != self._recorded("data_sha256"):
                raise DataError(f"{self.config.data}: the rows are not those that the run was trained on any more")
            self._data = data
        return self._data

    def both(self, ask: Callable[[GPT], T]) -> tuple[T, T]:
        """What ``ask`` says of the model before and of the one after. Raises OutOfTime where reading a model may take
        longer than there is time."""
        order = ("before", "after") if self._last == "before" else ("after", "before")
        found = {side: ask(self._model(side)) for side in order}
        self._last = order[1]
        return found["before"], found["after"]

    def _model(self, side: str) -> GPT:
        if self.adapted:
            if not self._held:
                assert self.base is not None
                self.budget.need(reading_seconds(self.best, self.base))
                model = self._held["both"] = self._read(self.best)
                self._adapter = model.adapter
            model = self._held["both"]
            wanted = self._adapter if side == "after" else None
            if model.adapter is not wanted:
                set_adapter(model, wanted)
            return model
        if side not in self._held:
            base, best = self.base, self.best
            own = best if side == "after" else base
            seconds = reading_seconds(*filter(None, (base, best)))
            self.budget.need(reading_seconds(own) if own else 0.0)
            if seconds > BOTH_SECONDS:
                self._held.clear()
                gc.collect()
            self._held[side] = self._read(best) if side == "after" else self._before()
        return self._held[side]

    def _before(self) -> GPT:
        if self.config.init == "random":
            return self.random_start()
        model = self._read(str(self.config.model))
        # Reading every file once more takes time, and at the end of a run it is what the run has just read.
        if not self.budget.limited and model.fingerprint != self._recorded("model_sha256"):
            raise WeightsError(f"{self.config.model}: is not the model that the run was trained from any more")
        return model

    def _read(self, source: str | Path) -> GPT:
        c = self.config
        return load_model(source, dtype=c.dtype, device=self.device, allow_nonfinite=c.allow_nonfinite)

    def random_start(self) -> GPT:
        """The model of a run with init random, as it began."""
        c = self.config
        assert c.config is not None  # TrainConfig checks it
        size = self.tokenizer.vocab_size
        return new_model(c.config, vocab_size=size, seed=c.seed, dtype=c.dtype, device=self.device).eval()

    def _recorded(self, name: str) -> object:
        return self.facts.contents.get(name)
