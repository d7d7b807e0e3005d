"""Make ``train.csv`` and ``dev.csv``: English sentences and their Spanish translations.

    python examples/translation/make_data.py [--output FOLDER]

Half of the patterns of everyday sentences are built by the rules below from ``lexicon.yaml``, which says how each word
agrees; beside them stand the pairs of ``sentences.tsv``, written by hand, for what no rule gives (idioms, the weather,
ages, the time, pronouns). Dev rows hold nouns in company in which no training row has them: a verb with its object, or
a noun with its adjective, is on one side only, and so is each hand-written pair.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from making import Draw, overlap, words, write_table  # noqa: E402

TRAIN_ROWS, DEV_ROWS = 1400, 56  # of the rules; the hand-written pairs come on top
MAX_OVERLAP = 0.72  # largest share of words that a dev sentence may have in common with a training sentence
HELD_OUT = 6  # one pair of words in so many is kept for dev rows

INSTRUCTION = "Translate into Spanish."
PERSONS = ("yo", "tú", "él", "nosotros", "ellos")
FUTURE = ("é", "ás", "á", "emos", "án")
WANT = ("quiero", "quieres", "quiere", "queremos", "quieren")
MUST = ("tengo que", "tienes que", "tiene que", "tenemos que", "tienen que")
NUMBERS = {"two": "dos", "three": "tres", "four": "cuatro", "five": "cinco", "six": "seis"}
# English, then Spanish by gender and number: ms fs mp fp. None: not with that number.
DETERMINERS = {
    "the": ("el", "la", "los", "las"),
    "a": ("un", "una", None, None),
    "my": ("mi", "mi", "mis", "mis"),
    "your": ("tu", "tu", "tus", "tus"),
    "our": ("nuestro", "nuestra", "nuestros", "nuestras"),
    "this": ("este", "esta", None, None),
    "that": ("ese", "esa", None, None),
    "these": (None, None, "estos", "estas"),
    "those": (None, None, "esos", "esas"),
    "many": (None, None, "muchos", "muchas"),
    **{number: (None, None, spanish, spanish) for number, spanish in NUMBERS.items()},
}

OWNERS = ("my", "your", "our")  # nobody owns a bridge
# Nobody plans to lose things, and a need of yesterday takes the imperfect, which the lexicon does not have.
TENSES = {"lose": ("past",), "need": ("present", "future")}
WONDERED = ("big", "small", "beautiful", "expensive", "cheap", "delicious", "heavy", "narrow")
UNGRADED = ("empty", "closed", "open", "broken", "red", "blue", "green", "white", "black", "yellow")


@dataclass(frozen=True)
class Noun:
    english: tuple[str, str]  # singular, plural
    spanish: tuple[str, str]
    feminine: bool
    kind: str


@dataclass(frozen=True)
class Adjective:
    english: str
    spanish: tuple[str, ...]  # ms fs mp fp
    kinds: frozenset[str]


@dataclass(frozen=True)
class Verb:
    base: str
    third: str
    past: str
    infinitive: str
    present: tuple[str, ...]  # by PERSONS
    preterite: tuple[str, ...]
    objects: tuple[Noun, ...]
    places: str


@dataclass(frozen=True)
class Phrase:
    """A noun with what stands before and after it, in both languages."""

    english: str
    spanish: str
    plural: bool
    noun: Noun
    pair: str = ""  # the noun and its adjective, where it has one


class Lexicon:
    def __init__(self) -> None:
        bank: dict[str, Any] = yaml.safe_load((HERE / "lexicon.yaml").read_text(encoding="utf-8"))
        self.nouns = []
        for line in bank["nouns"]:
            english, spanish, gender, kind = cells(line)
            self.nouns.append(Noun(two(english), two(spanish), gender == "f", kind))
        self.adjectives, self.states = (
            [
                Adjective(english, tuple(spanish.split()), frozenset(kinds.split()))
                for english, spanish, kinds in map(cells, bank[name])
            ]
            for name in ("adjectives", "states")
        )
        self.verbs = []
        for line in bank["verbs"]:
            forms, infinitive, present, preterite, kinds, places = cells(line)
            base, third, past = (form.replace("_", " ") for form in forms.split())
            only = bank["only"].get(base.replace(" ", "_"), [])
            objects = tuple(n for n in self.nouns if (n.english[0] in only if only else n.kind in kinds.split()))
            spoken = (tuple(present.split()), tuple(preterite.split()))
            self.verbs.append(Verb(base, third, past, infinitive, *spoken, objects, places))
        self.subjects = [(e, s, PERSONS.index(person)) for e, s, person in map(cells, bank["subjects"])]
        self.places = {name: list(map(cells, lines)) for name, lines in bank["places"].items()} | {"none": []}
        self.times = {name: list(map(cells, lines)) for name, lines in bank["times"].items()}


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split("|"))


def two(text: str) -> tuple[str, str]:
    first, second = text.split()
    return first, second


def held_out(pair: str) -> bool:
    """Whether two words that stand together are kept for dev rows."""
    return crc32(pair.encode()) % HELD_OUT == 0


def agree(forms: tuple[str | None, ...] | tuple[str, ...], noun: Noun, plural: bool) -> str:
    return forms[2 * plural + noun.feminine] or ""


def noun_phrase(
    lexicon: Lexicon,
    noun: Noun,
    draw: Draw,
    *,
    determiner: str = "",
    plural: bool | None = None,
    described: float = 0.5,
) -> Phrase:
    """Determiner, noun and perhaps an adjective: "those white shirts", "esas camisas blancas"."""
    plural = draw.chance(0.35) if plural is None else plural
    fitting = [word for word, forms in DETERMINERS.items() if agree(forms, noun, plural)]
    unfit = {"many", *NUMBERS, *(OWNERS if noun.kind == "town" else ())}
    determiner = determiner or draw.one([word for word in fitting if word not in unfit])
    suited = [a for a in lexicon.adjectives if noun.kind in a.kinds]
    adjective = draw.one(suited) if draw.chance(described) else None
    described_en = f"{adjective.english} {noun.english[plural]}" if adjective else noun.english[plural]
    described_es = noun.spanish[plural] + (f" {agree(adjective.spanish, noun, plural)}" if adjective else "")
    article = "an" if determiner == "a" and described_en[0] in "aeiou" else determiner
    pair = f"{noun.english[0]} {adjective.english}" if adjective else ""
    return Phrase(
        f"{article} {described_en}",
        f"{agree(DETERMINERS[determiner], noun, plural)} {described_es}",
        plural,
        noun,
        pair,
    )


# --- Patterns: each gives an English and a Spanish sentence, and the pairs of words that decide where it may stand.
Sentence = tuple[str, str, list[str]]


def adverbials(lexicon: Lexicon, verb: Verb, tense: str, draw: Draw) -> tuple[str, str]:
    """Where and when, either of which may be missing; for the future always when."""
    english, spanish = "", ""
    if lexicon.places[verb.places] and draw.chance(0.3):
        place = draw.one(lexicon.places[verb.places])
        english, spanish = f" {place[0]}", f" {place[1]}"
    if tense == "future" or draw.chance(0.5):
        time = draw.one(lexicon.times[tense])
        english, spanish = f"{english} {time[0]}", f"{spanish} {time[1]}"
    return english, spanish


def action(lexicon: Lexicon, draw: Draw) -> Sentence:
    """Somebody does something: a statement, a denial or a question in three tenses, or with "want to", "have to"."""
    subject, sujeto, person = draw.one(lexicon.subjects)
    verb = draw.one(lexicon.verbs)
    singular = person == PERSONS.index("él")
    tense = draw.one(TENSES.get(verb.base, ("present", "past", "future")))
    mood = draw.one(("plain", "plain", "plain", "denied", "asked", "want", "must"))
    if mood == "asked" and subject == "I":
        mood = "plain"
    if mood in ("want", "must"):
        tense = "present"
        verb = draw.one([v for v in lexicon.verbs if v.base not in TENSES])
    thing = noun_phrase(lexicon, draw.one(verb.objects), draw)
    where_en, where_es = adverbials(lexicon, verb, tense, draw)
    finite = {
        "present": verb.present[person],
        "past": verb.preterite[person],
        "future": verb.infinitive + FUTURE[person],
    }[tense]
    helper = {"present": "does" if singular else "do", "past": "did", "future": "will"}[tense]
    rest_en, rest_es = thing.english + where_en, thing.spanish + where_es
    who = f"{sujeto} " if sujeto else ""
    pairs = [f"{verb.base} {thing.noun.english[0]}", thing.pair]
    if mood == "want":
        modal = "wants to" if singular else "want to"
        return f"{subject} {modal} {verb.base} {rest_en}.", f"{who}{WANT[person]} {verb.infinitive} {rest_es}.", pairs
    if mood == "must":
        modal = "has to" if singular else "have to"
        return f"{subject} {modal} {verb.base} {rest_en}.", f"{who}{MUST[person]} {verb.infinitive} {rest_es}.", pairs
    if mood == "asked":
        # A question puts the subject behind the verb; a short one is left out as in a statement.
        asked = f"¿{finite} {who}{rest_es}?"
        return f"{helper} {subject} {verb.base} {rest_en}?", asked, pairs
    if mood == "denied":
        return f"{subject} {helper} not {verb.base} {rest_en}.", f"{who}no {finite} {rest_es}.", pairs
    said = {"present": verb.third if singular else verb.base, "past": verb.past, "future": f"will {verb.base}"}[tense]
    return f"{subject} {said} {rest_en}.", f"{who}{finite} {rest_es}.", pairs


def quality(lexicon: Lexicon, draw: Draw) -> Sentence:
    """What a thing is: with "ser" for what it is like, with "estar" for the state it is in."""
    is_state = draw.chance(0.5)
    adjective = draw.one(lexicon.states if is_state else lexicon.adjectives)
    noun = draw.one([n for n in lexicon.nouns if n.kind in adjective.kinds])
    owners = () if noun.kind == "town" else OWNERS
    determiner = draw.one(("the", "this", "that", "these", "those", *owners))
    plural = determiner in ("these", "those") or (determiner not in ("this", "that") and draw.chance(0.4))
    thing = noun_phrase(lexicon, noun, draw, determiner=determiner, plural=plural, described=0.0)
    verb_en = "are" if plural else "is"
    verb_es = (("está", "están") if is_state else ("es", "son"))[plural]
    very_en, very_es = ("very ", "muy ") if adjective.english not in UNGRADED else ("", "")
    if draw.chance(0.5):
        very_en = very_es = ""
    said = agree(adjective.spanish, noun, plural)
    pairs = [f"{noun.english[0]} {adjective.english}"]
    if draw.chance(0.3):
        verb_en, no = f"{verb_en} not", "no "
    else:
        no = ""
    if not no and draw.chance(0.25):
        question = f"{verb_en} {thing.english} {very_en}{adjective.english}?"
        return question, f"¿{verb_es} {very_es}{said} {thing.spanish}?", pairs
    return (
        f"{thing.english} {verb_en} {very_en}{adjective.english}.",
        f"{thing.spanish} {no}{verb_es} {very_es}{said}.",
        pairs,
    )


def liking(lexicon: Lexicon, draw: Draw) -> Sentence:
    """ "Gustar" turns the sentence round: what is liked is its subject."""
    who, whom = draw.one((("I", "me"), ("you", "te"), ("we", "nos"), ("they", "les")))
    noun = draw.one([n for n in lexicon.nouns if n.kind in ("clothes", "furniture", "building", "flower", "reading")])
    determiner = draw.one(("your", "this", "that", "these", "those"))
    plural = determiner in ("these", "those") or (determiner == "your" and draw.chance(0.4))
    thing = noun_phrase(lexicon, noun, draw, determiner=determiner, plural=plural, described=0.7)
    likes = "gustan" if plural else "gusta"
    mood = draw.index(3)
    if mood == 0:
        return f"{who} like {thing.english}.", f"{whom} {likes} {thing.spanish}.", [thing.pair]
    if mood == 1:
        return f"{who} do not like {thing.english}.", f"no {whom} {likes} {thing.spanish}.", [thing.pair]
    thing = noun_phrase(lexicon, noun, draw, determiner="this", plural=False, described=0.7)
    return f"do you like {thing.english}?", f"¿te gusta {thing.spanish}?", [thing.pair]


def presence(lexicon: Lexicon, draw: Draw) -> Sentence:
    """There is, there are: "hay" for one and for many."""
    noun = draw.one([n for n in lexicon.nouns if n.kind in ("clothes", "furniture", "thing", "reading")])
    plural = draw.chance(0.6)
    determiner = draw.one((*NUMBERS, "many")) if plural else "a"
    thing = noun_phrase(lexicon, noun, draw, determiner=determiner, plural=plural, described=0.4)
    place = draw.one(lexicon.places["room"])
    return (
        f"there {'are' if plural else 'is'} {thing.english} {place[0]}.",
        f"hay {thing.spanish} {place[1]}.",
        [thing.pair, f"{noun.english[0]} {place[0]}"],
    )


def whereabouts(lexicon: Lexicon, draw: Draw) -> Sentence:
    """Where something is: always "estar"."""
    noun = draw.one([n for n in lexicon.nouns if n.kind in ("clothes", "thing", "reading", "press")])
    determiner = draw.one(("the", "my", "your", "our"))
    thing = noun_phrase(lexicon, noun, draw, determiner=determiner, described=0.4)
    is_en, is_es = (("is", "are")[thing.plural], ("está", "están")[thing.plural])
    place = draw.one(lexicon.places["room"])
    pairs = [thing.pair, f"{noun.english[0]} {place[0]}"]
    if draw.chance(0.3):
        return f"where {is_en} {thing.english}?", f"¿dónde {is_es} {thing.spanish}?", [thing.pair]
    return f"{thing.english} {is_en} {place[0]}.", f"{thing.spanish} {is_es} {place[1]}.", pairs


def wonder(lexicon: Lexicon, draw: Draw) -> Sentence:
    """What a beautiful garden: "qué" and "tan" around the noun."""
    noun = draw.one([n for n in lexicon.nouns if n.kind in ("clothes", "furniture", "building", "flower", "food")])
    adjective = draw.one([a for a in lexicon.adjectives if noun.kind in a.kinds and a.english in WONDERED])
    article = "an" if adjective.english[0] in "aeiou" else "a"
    return (
        f"what {article} {adjective.english} {noun.english[0]}!",
        f"¡qué {noun.spanish[0]} tan {agree(adjective.spanish, noun, False)}!",
        [f"{noun.english[0]} {adjective.english}"],
    )


PATTERNS = (action, action, action, action, quality, quality, liking, presence, whereabouts, wonder)


def sentence(pattern_text: str) -> str:
    """With a capital at the beginning, behind an inverted mark too."""
    start = 1 if pattern_text[0] in "¿¡" else 0
    return pattern_text[:start] + pattern_text[start].upper() + pattern_text[start + 1 :]


def built(lexicon: Lexicon, draw: Draw, *, dev: bool) -> Iterator[tuple[str, str]]:
    """Sentences without end whose pairs of words belong to the split."""
    while True:
        english, spanish, pairs = draw.one(PATTERNS)(lexicon, draw)
        kept = [held_out(pair) for pair in pairs if pair]
        if kept and (any(kept) if dev else not any(kept)):
            yield sentence(english), sentence(spanish)


def make(seed: int = 3) -> dict[str, list[tuple[str, str]]]:
    """{"train": [...], "dev": [...]}: (English, Spanish) in a shuffled order, no English sentence twice."""
    lexicon, draw = Lexicon(), Draw(seed)
    with (HERE / "sentences.tsv").open(encoding="utf-8", newline="") as file:
        written = [(row["split"], (row["english"], row["spanish"])) for row in csv.DictReader(file, delimiter="\t")]
    train = dict(pair for split, pair in written if split == "train")
    size = TRAIN_ROWS + len(train)
    for english, spanish in built(lexicon, draw, dev=False):
        if len(train) == size:
            break
        train[english] = spanish
    seen = [words(english) for english in train]
    dev = dict(pair for split, pair in written if split == "dev")
    size = DEV_ROWS + len(dev)
    for english, spanish in built(lexicon, draw, dev=True):
        if len(dev) == size:
            break
        if all(overlap(words(english), other) <= MAX_OVERLAP for other in seen):
            dev[english] = spanish
    return {"train": draw.shuffled(train.items()), "dev": draw.shuffled(dev.items())}


def write(folder: Path) -> None:
    for split, pairs in make().items():
        rows = [(INSTRUCTION, english, spanish) for english, spanish in pairs]
        write_table(folder / f"{split}.csv", ("instruction", "english", "spanish"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the translation set from its lexicon and sentences.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: beside this script)")
    write(parser.parse_args().output)
