"""What the server counts, as text that Prometheus reads.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
EACH_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Counter:
    """A number that only grows, one for each set of label values."""

    kind = "counter"

    def __init__(self, help: str, *labels: str) -> None:
        self.help, self._labels = help, labels
        self.values: dict[tuple[str, ...], float] = defaultdict(float)
        if not labels:
            self.values[()] = 0.0

    def add(self, amount: float = 1, *labels: str) -> None:
        self.values[labels] += amount

    def lines(self, name: str) -> Iterator[str]:
        for labels, value in sorted(self.values.items()):
            yield f"{name}{_braces(self._labels, labels)} {value:.16g}"


class Gauge:
    """A number that is asked for when it is read."""

    kind = "gauge"

    def __init__(self, help: str, read: Callable[[], float]) -> None:
        self.help, self._read = help, read

    def lines(self, name: str) -> Iterator[str]:
        yield f"{name} {self._read():.16g}"


class Histogram:
    """How many values were at most each bound, their number and their sum."""

    kind = "histogram"

    def __init__(self, help: str, bounds: tuple[float, ...]) -> None:
        self.help, self._bounds = help, bounds
        self._counts, self.sum, self.count = [0] * (len(bounds) + 1), 0.0, 0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value
        self.count += 1

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.count}"


class Metrics:
    """All of them. Changed and read on the thread of the event loop only."""

    def __init__(self) -> None:
        self.requests = Counter("Requests answered, by route and status.", "route", "status")
        self.cancelled = Counter("Texts given up because the client left, the time was over or the server stopped.")
        self.prompt_tokens = Counter("Tokens of prompts.")
        self.cached_tokens = Counter("Tokens of prompts whose keys and values were there already.")
        self.generated_tokens = Counter("Tokens written.")
        self.first_token = Histogram("Seconds from a request to its first token.", FIRST_TOKEN)
        self.each_token = Histogram("Mean seconds for each further token of a text.", EACH_TOKEN)
        self.gauges: dict[str, Gauge] = {}

    def to_text(self) -> str:
        named: dict[str, Counter | Gauge | Histogram] = {
            "requests_total": self.requests,
            "cancelled_total": self.cancelled,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_prompt_tokens_total": self.cached_tokens,
            "generated_tokens_total": self.generated_tokens,
            "time_to_first_token_seconds": self.first_token,
            "time_per_token_seconds": self.each_token,
            **self.gauges,
        }
        lines: list[str] = []
        for short, metric in named.items():
            name = f"afina_{short}"
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}", *metric.lines(name)]
        return "\n".join(lines) + "\n"


def _braces(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in zip(names, values, strict=True))
    return f"{{{inner}}}" if inner else ""
