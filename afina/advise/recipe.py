"""The advised settings as a YAML recipe that says where they come from."""

from __future__ import annotations

import textwrap

import yaml

from afina.advise.measure import Advice
from afina.errors import ConfigError


def recipe_text(advice: Advice) -> str:
    """The recipe, with the verdict and its reasons as comments. Raises ConfigError where there is no recipe."""
    if advice.recipe is None:
        raise ConfigError("there is no recipe: no run was measured")
    lines = [f"Verdict of afina advise: {advice.decision.verdict}.", *advice.decision.reasons]
    comment = "".join(f"# {line}\n" for text in lines for line in textwrap.wrap(text, 110))
    return comment + yaml.safe_dump(advice.recipe, sort_keys=False, allow_unicode=True)
