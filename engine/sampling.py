"""How generation chooses tokens: the settings, without torch, for the command line too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from afina.engine.settings import (
    BIASES,
    FRACTION,
    NOT_NEGATIVE,
    PENALTY,
    POSITIVE,
    RATE,
    SEED,
    TOP_LOGPROBS,
    Settings,
    setting,
)


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token is chosen and when a text ends. Raises ConfigError for values that mean nothing.

    A text ends at an end token of the model, before the first of the ``stop`` strings, after ``max_new_tokens``, or
    where the model's context ends.
    """

    max_new_tokens: int = setting(128, "tokens to write at most", limit=POSITIVE)
    temperature: float = setting(
        0.0, "above 0: sample, flatter as it grows; 0: always the likeliest", limit=NOT_NEGATIVE
    )
    top_k: int | None = setting(None, "sample from the K likeliest tokens", limit=POSITIVE)
    top_p: float | None = setting(None, "sample from the likeliest tokens that sum to P", limit=RATE)
    min_p: float | None = setting(
        None, "sample from tokens of at least P times the likeliest's probability", limit=FRACTION
    )
    repetition_penalty: float = setting(1.0, "above 1: repeat less (arXiv 1909.05858)", limit=POSITIVE)
    presence_penalty: float = setting(
        0.0, "taken once from the logit of each token that the text already has", limit=PENALTY
    )
    frequency_penalty: float = setting(
        0.0, "taken from a token's logit as often as the text already has it", limit=PENALTY
    )
    logit_bias: dict[int, float] = setting(  # noqa: RUF009 (it makes a field with a factory)
        dict, "added to the logits of tokens: ID=X,ID=X", limit=BIASES
    )
    logprobs: int | None = setting(
        None, "give each token's log-probability and those of the N likeliest", limit=TOP_LOGPROBS
    )
    stop: tuple[str, ...] = setting((), "end before this text; may be given several times")
    seed: int = setting(0, "seed of the sampling; a prompt's text depends on no other prompt", limit=SEED)

    def nth(self, number: int) -> Sampling:
        """The same for the ``number``-th of several completions of one prompt: seed + number, modulo 2**63."""
        return replace(self, seed=(self.seed + number) % 2**63)
