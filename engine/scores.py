"""Answers against references: a figure for each row, and the figures of a whole set that are no means of rows.

Nothing here knows a model. Sources: exact match and token F1 as SQuAD counts them (arXiv 1606.05250), ROUGE-L (Lin
2004), chrF (Popović 2015) and BLEU (Papineni et al. 2002) by sacrebleu (arXiv 1804.08771), macro-F1 as scikit-learn
has it, expected calibration error (arXiv 1706.04599), MRR and nDCG (Järvelin and Kekäläinen 2002).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.errors import ConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")
CALIBRATION_BINS = 10
CUTOFF = 10  # of MRR and nDCG
RECALLS = (1, 5, 10)


def plain(text: str, ignore_case: bool = False) -> str:
    """A text as exact match compares it: without surrounding whitespace."""
    return text.strip().casefold() if ignore_case else text.strip()


def exact_match(prediction: str, reference: str, *, ignore_case: bool = False) -> float:
    """1.0 where both are equal, surrounding whitespace aside, else 0.0."""
    return float(plain(prediction, ignore_case) == plain(reference, ignore_case))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have, as SQuAD's own script counts them: in lower case, without ASCII punctuation and
    without the English articles. Where one of them has no word left, 1.0 if both have none, else 0.0."""
    ours, theirs = (
        _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split() for text in (prediction, reference)
    )
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in lower case, without stemming.

    A word is a run of letters and digits of any script; on ASCII texts that is what the package rouge_score takes.
    """
    ours, theirs = (_WORD.findall(text.lower()) for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    # lengths[j]: the longest common subsequence of the words of ours so far and the first j of theirs.
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(ours) + len(theirs))


def has_sacrebleu() -> bool:
    """Whether BLEU and chrF can be computed here."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _sacrebleu(name: str) -> Any:
    """sacrebleu's metric with its defaults: "chrf" (chrF2) or "bleu" (13a)."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ConfigError(f"{name} is computed by sacrebleu, which is not installed: pip install 'afina[eval]'") from (
            error
        )
    return CHRF() if name == "chrf" else BLEU()


def chrf(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """chrF2 of a set, from 0 to 100, and sacrebleu's signature. Raises ConfigError where sacrebleu is missing."""
    return _corpus("chrf", predictions, references)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU of a set, from 0 to 100, and sacrebleu's signature. Raises ConfigError where sacrebleu is missing."""
    return _corpus("bleu", predictions, references)


def _corpus(name: str, predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    metric = _sacrebleu(name)
    score = metric.corpus_score(list(predictions), [list(references)]).score
    return float(score), str(metric.get_signature())


def corpus_counts(name: str, predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """What each row adds to the counts that "chrf" or "bleu" is made of -> (rows, counts); their sum gives the score
    (``score_of_counts``), so a set can be resampled without counting n-grams again."""
    metric = _sacrebleu(name)
    counts = metric._extract_corpus_statistics(list(predictions), [list(references)])
    return np.array(counts, np.float64).reshape(len(predictions), -1)


def score_of_counts(name: str, counts: NDArray[np.float64]) -> float:
    """The score of the rows whose counts (rows, counts) these are, from 0 to 100."""
    return float(_sacrebleu(name)._compute_score_from_stats(counts.sum(0).astype(int).tolist()).score)


def sentence_scores(name: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ "chrf" of each row on its own, from 0 to 100."""
    metric = _sacrebleu(name)
    return [float(metric.sentence_score(p, [r]).score) for p, r in zip(predictions, references, strict=True)]


def classification(
    predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """Accuracy, macro-F1 and the confusion matrix, {wanted: {predicted: rows}}, without zeros.

    Macro-F1 is the plain mean of F1 over the labels that ``wanted`` holds, ``labels`` of them. A prediction outside of
    ``labels`` (default: those of ``wanted``) counts as wrong and in ``unknown``.
    """
    support, guesses = Counter(wanted), Counter(predicted)
    right = Counter(w for p, w in zip(predicted, wanted, strict=True) if p == w)
    known = set(support if labels is None else labels)
    confusion: dict[str, dict[str, int]] = {label: {} for label in sorted(support)}
    for (label, guess), count in sorted(Counter(zip(wanted, predicted)).items()):
        confusion[label][guess] = count
    return {
        "accuracy": sum(right.values()) / len(wanted),
        "macro_f1": macro_f1(support, guesses, right),
        "labels": len(support),
        "unknown": sum(count for label, count in guesses.items() if label not in known),
        "confusion": confusion,
    }


def macro_f1(support: Counter[Any], guesses: Counter[Any], right: Counter[Any]) -> float:
    """The mean of F1 over the labels with ``support``: rows that want a label, that are given it, and both."""
    return sum(2 * right[label] / (support[label] + guesses[label]) for label in support) / len(support)


def calibration(
    probabilities: Sequence[float] | NDArray[Any],
    correct: Sequence[float] | NDArray[Any],
    *,
    bins: int = CALIBRATION_BINS,
) -> dict[str, Any]:
    """Whether answers are as often right as their probabilities say.

    ``probabilities``: of each row's answer, from 0 to 1; ``correct``: whether it was right, 0 or 1. Returns ``ece``,
    the mean over rows of the distance between a bin's mean probability and its share of right answers, and ``bins`` of
    equal width (low, high], without empty ones.
    """
    sure, right = np.asarray(probabilities, np.float64), np.asarray(correct, np.float64)
    number = _bin(sure, bins)
    found = []
    for i in np.unique(number).tolist():
        inside = number == i
        found.append(
            {
                "low": i / bins,
                "high": (i + 1) / bins,
                "rows": int(inside.sum()),
                "confidence": float(sure[inside].mean()),
                "accuracy": float(right[inside].mean()),
            }
        )
    return {"ece": calibration_error(np.stack([sure, right], axis=1), bins), "bins": found}


def calibration_error(values: NDArray[np.float64], bins: int = CALIBRATION_BINS) -> float:
    """The ``ece`` of ``calibration``, of values (rows, 2): probability and whether right. In a bin of n rows, n times
    the distance between the means is the distance between the sums."""
    excess = np.bincount(_bin(values[:, 0], bins), weights=values[:, 0] - values[:, 1])
    return float(np.abs(excess).sum() / len(values))


def _bin(probabilities: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.maximum(np.ceil(probabilities * bins).astype(np.int64) - 1, 0)


def reciprocal_rank(rank: int) -> float:
    """1 / rank of the right candidate, counted from 1; 0.0 below the tenth."""
    return 1.0 / rank if rank <= CUTOFF else 0.0


def discounted_gain(rank: int) -> float:
    """nDCG@10 of a ranking in which one candidate is right: 1 / log2(1 + rank), 0.0 below the tenth."""
    return 1.0 / math.log2(1 + rank) if rank <= CUTOFF else 0.0


def ranking(ranks: Sequence[int], candidates: Sequence[int]) -> dict[str, float]:
    """MRR@10, nDCG@10 and recall@k from the rank of the right candidate, counted from 1, among ``candidates`` of each
    row, of which one is right; and ``chance@1``, the recall@1 of a random order."""
    count = len(ranks)
    result = {"mrr@10": sum(map(reciprocal_rank, ranks)) / count}
    result |= {f"recall@{k}": sum(rank <= k for rank in ranks) / count for k in RECALLS}
    result["ndcg@10"] = sum(map(discounted_gain, ranks)) / count
    result["chance@1"] = sum(1 / n for n in candidates) / count
    return result
