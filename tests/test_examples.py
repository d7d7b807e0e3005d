"""The five use cases: each can be run as it lies there, its script makes its data, and its dev rows are held out."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import REPO

from afina.cli.main import run
from afina.engine.questions import answer_of, prompt_of
from afina.engine.train_config import TrainConfig
from afina.loaders.data.rows import read_rows
from afina.loaders.text.render import Example
from afina.loaders.weights.package_index import MODELS

pytestmark = pytest.mark.usefixtures("own_cache")
EXAMPLES = REPO / "examples"
# The schema of a case's rows, and the task that `afina eval` guesses for them.
USE_CASES = {
    "support": ("messages", "generate"),
    "content": ("instruction/output", "generate"),
    "translation": ("instruction/output", "translate"),
    "retrieval": ("messages", "retrieve"),
    "sentiment": ("text/label", "classify"),
}
MADE = [name for name in USE_CASES if name != "support"]  # whose script has a test of its own


def script(name: str) -> ModuleType:
    """A case's data script, loaded once."""
    module_name = f"make_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, EXAMPLES / name / "make_data.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def recipe(name: str, file: str = "recipe.yaml") -> TrainConfig:
    return TrainConfig.resolve(f"examples/{name}/{file}")


def rows(name: str, split: str) -> list[Example]:
    config = recipe(name)
    path = config.data if split == "train" else config.val_file
    assert path is not None
    return [row.example for row in read_rows(REPO / path, columns=config.columns, chat=True)]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # the paths in a recipe are those of the repository's root


@pytest.mark.parametrize("name", USE_CASES)
def test_a_folder_has_two_recipes_and_words(name: str) -> None:
    page = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    assert f"]({name}/README.md)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in ("recipe.yaml", "recipe-smollm2.yaml"):
        assert f"afina train examples/{name}/{file}" in page
        text = (EXAMPLES / name / file).read_text(encoding="utf-8")
        assert re.search(r"^learning_rate: ", text, re.MULTILINE), "a recipe says the rate that was tried"
        config = recipe(name, file)
        assert config.output_dir == f"out/{name}" + ("-smollm2" if "smollm2" in file else "")
        for path in (config.data, config.val_file):
            assert path is not None
            assert (REPO / path).is_file()
    assert recipe(name).model == "afina-tiny"
    assert recipe(name, "recipe-smollm2.yaml").model in MODELS
    assert recipe(name, "recipe-smollm2.yaml").method == "lora"


@pytest.mark.parametrize("name", USE_CASES)
def test_rows_are_many_distinct_and_held_out(name: str) -> None:
    making = sys.modules.get("making") or (script(name) and sys.modules["making"])
    assert {row.messages is not None for row in rows(name, "train")} == {USE_CASES[name][0] != "text/label"}
    train, dev = rows(name, "train"), rows(name, "dev")
    assert len(train) >= 400
    assert len(dev) >= 60
    asked = {split: [prompt_of(row) for row in found] for split, found in (("train", train), ("dev", dev))}
    for prompts in asked.values():
        assert len(set(prompts)) == len(prompts)
    # A dev row is no near-copy of a training row, what all rows have in common aside.
    bags = {split: [making.words(prompt) for prompt in prompts] for split, prompts in asked.items()}
    common = frozenset.intersection(*bags["train"])
    nearest = [max(making.overlap(bag - common, other - common) for other in bags["train"]) for bag in bags["dev"]]
    assert max(nearest) <= {"translation": 0.85}.get(name, 0.65)
    assert sorted(nearest)[len(nearest) // 2] <= {"translation": 0.72}.get(name, 0.5)


@pytest.mark.parametrize("name", MADE)
def test_the_script_makes_the_data(name: str, tmp_path: Path) -> None:
    script(name).write(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert {path.stem for path in made} == {"train", "dev"}
    for path in made:
        assert path.read_bytes() == (EXAMPLES / name / path.name).read_bytes()
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize("name", USE_CASES)
def test_a_short_run_and_its_measure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe through the command line, two steps long, and the task's figures before and after."""
    config = recipe(name)
    assert config.val_file is not None
    lines = Path(config.val_file).read_text(encoding="utf-8").splitlines(keepends=True)
    few = tmp_path / f"few{Path(config.val_file).suffix}"
    few.write_text("".join(lines[:5]), encoding="utf-8", newline="")
    short = ["--max_steps", "2", "--batch_size", "2", "--val_file", str(few), "--threads", "1"]
    place = ["--output_dir", str(tmp_path / "run")]
    assert run(["train", f"examples/{name}/recipe.yaml", *short, *place, "--json"]) == 0, capsys.readouterr().err
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained["steps"] == 2
    assert trained["dev_loss"] < trained["dev_loss_before"]
    columns = [f"{ours}={theirs}" for ours, theirs in config.columns.items()]
    words = ["eval", str(tmp_path / "run"), "--data", str(few), "--base", "afina-tiny", "--max_new_tokens", "4"]
    words += ["--columns", ",".join(columns)] if columns else []
    _, task = USE_CASES[name]
    words += ["--options", "positive,negative,mixed"] if task == "classify" else []
    assert run([*words, "--task", task, "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rows"] == len(lines[:5]) - (Path(config.val_file).suffix in (".csv", ".tsv"))
    assert result["comparison"]["metric"] == result["metric"]
    assert result["comparison"]["verdict"] in ("better", "worse", "no difference")


# --- What the rows of a case must be ---------------------------------------------------------------------------------


def pairs_of(split: str) -> list[tuple[str, str]]:
    with (EXAMPLES / "translation" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [(row["english"], row["spanish"]) for row in csv.DictReader(file)]


# What a Spanish noun's ending tells of its gender, and the nouns of the lexicon for which it tells nothing or lies.
ODD_MASCULINES = "poema tomate pastel estante reloj billete árbol puente lápiz guante paraguas melón sillón cajón tazón"
ODD_FEMININES = "llave flor torre calle"
ODD_GENDERS = {
    word: gender for words, gender in ((ODD_MASCULINES, "m"), (ODD_FEMININES, "f")) for word in words.split()
}
MARKED = "el un este ese nuestro los estos esos nuestros muchos la una esta esa nuestra las estas esas nuestras muchas"
ALIKE = re.compile(r"(grande|azul|verde|interesante)(s|es)?")  # one form for both genders


def ending(word: str) -> tuple[str, bool]:
    """The gender and number that an article, or an adjective that has both genders, is written in."""
    plural = word.endswith("s") and word not in ("paraguas",)
    return ("f" if word.rstrip("s").endswith("a") else "m"), plural


def test_spanish_is_punctuated_and_agrees() -> None:
    """Inverted marks, and articles, possessives and adjectives in the gender and number of their noun."""
    nouns = {
        form: (noun, form == noun.spanish[1]) for noun in script("translation").Lexicon().nouns for form in noun.spanish
    }
    adjectives = {f for a in script("translation").Lexicon().adjectives for f in a.spanish if not ALIKE.fullmatch(f)}
    articles = adjectives_checked = 0
    for english, spanish in pairs_of("train") + pairs_of("dev"):
        for opening, closing in ("¿?", "¡!"):
            assert spanish.count(opening) == spanish.count(closing) == english.count(closing), spanish
        assert spanish[spanish[0] in "¿¡"].isupper() or spanish.startswith(("Perdone", "Claro"))
        assert "  " not in spanish + english
        assert not re.search(r"\b(?:a|de) el ", spanish), spanish
        words = re.findall(r"\w+", spanish.lower())
        for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
            noun, plural = nouns.get(word, (None, False))
            if noun is None:
                continue
            gender = ODD_GENDERS.get(noun.spanish[0]) or ending(noun.spanish[0])[0]
            if before in MARKED.split():
                wanted = "m" if before in ("el", "un", "este", "ese") else ending(before)[0]
                assert wanted == gender, spanish
                if word != "paraguas":
                    assert plural == ending(before)[1], spanish
                articles += 1
            if after in adjectives:
                assert ending(after)[0] == gender, spanish
                if word != "paraguas":
                    assert plural == ending(after)[1], spanish
                adjectives_checked += 1
    assert articles > 150
    assert adjectives_checked > 120


@pytest.mark.parametrize(
    ("english", "spanish"),
    [
        ("There are many shelves behind the door.", "Hay muchos estantes detrás de la puerta."),
        ("I do not like this black mirror.", "No me gusta este espejo negro."),
        ("What a cheap scarf!", "¡Qué bufanda tan barata!"),
        ("Are those windows open?", "¿Están abiertas esas ventanas?"),
        ("Did my sister sell the gloves last week?", "¿Vendió mi hermana los guantes la semana pasada?"),
        ("I have a headache.", "Me duele la cabeza."),
    ],
)
def test_spanish_as_a_speaker_writes_it(english: str, spanish: str) -> None:
    assert dict(pairs_of("train") + pairs_of("dev"))[english] == spanish


def test_dev_translations_keep_their_words_apart() -> None:
    """Hand-written dev pairs are in no training row, on either side."""
    train, dev = pairs_of("train"), pairs_of("dev")
    assert not {english for english, _ in train} & {english for english, _ in dev}
    assert len({spanish for _, spanish in dev} & {spanish for _, spanish in train}) <= 1  # two ways to say one thing


def test_candidates_hold_the_answer_and_dev_topics_are_new() -> None:
    train, dev = rows("retrieval", "train"), rows("retrieval", "dev")
    for row in dev:
        assert row.candidates is not None
        assert len(set(row.candidates)) == 5
        assert answer_of(row) in row.candidates
        assert all(f"- {text}\n" in prompt_of(row) for text in row.candidates)
    known = {line for row in train for line in prompt_of(row).splitlines()}
    new = {line for row in dev for line in prompt_of(row).splitlines() if line[:2] == "- " or "Question" in line}
    assert not known & new
    places = [row.candidates.index(str(answer_of(row))) for row in dev if row.candidates]
    assert max(places.count(place) for place in range(5)) <= len(dev) // 3  # the place tells nothing


def test_labels_are_balanced_and_dev_sentences_are_new() -> None:
    def sentences(split: str) -> set[str]:
        return {part for row in rows("sentiment", split) for part in re.split(r"(?<=[.!?]) ", prompt_of(row).strip())}

    for split in ("train", "dev"):
        labels = [answer_of(row) for row in rows("sentiment", split)]
        assert len({labels.count(label) for label in ("positive", "negative", "mixed")}) == 1
    assert not sentences("train") & sentences("dev")


def test_texts_keep_the_house_style_and_say_what_was_noted() -> None:
    content = script("content")
    names: dict[str, set[str]] = {}
    for split in ("train", "dev"):
        for row in rows("content", split):
            text = str(answer_of(row))
            assert content.breaches(text) == []
            notes: dict[str, Any] = dict(re.findall(r"(\w+): (.*?)(?:; |\n|$)", prompt_of(row).partition("\n\n")[2]))
            names.setdefault(split, set()).add(notes["product"])
            assert all(notes[key] in text for key in ("product", "material", "size", "price"))
            assert all(fact in text for fact in notes["notes"].split(", "))
    assert not names["train"] & names["dev"]


@pytest.mark.parametrize(
    "text",
    [
        "The Wren kettle: polished copper, 1.5 litres. It boils at once! Wash it by hand. 95 euros, sent tomorrow.",
        "The Wren kettle: polished copper, 1.5 litres. A perfect kettle. Wash it by hand. 95 euros, sent tomorrow.",
        "A kettle of polished copper. It boils in three minutes. Wash it by hand. 95 euros, sent tomorrow.",
        "The Wren kettle: polished copper, 1.5 litres. It boils in three minutes. 95 euros, sent tomorrow.",
        "The Wren kettle: polished copper, 1.5 litres. It boils in three minutes. Wash it by hand. Only 95 euros.",
    ],
)
def test_another_style_is_told(text: str) -> None:
    assert script("content").breaches(text)
