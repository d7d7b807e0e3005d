"""Token sets: what is learnt, what is left out and why, the split, and the cache they come from."""

from __future__ import annotations

import gc
import gzip
import json
import resource
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

from afina.errors import DataError
from afina.loaders.data import token_pass
from afina.loaders.data.dataset import Data, TokenSet, permutation, prepare
from afina.loaders.data.token_cache import COLUMNS, TokenCache, open_cache
from afina.loaders.data.token_pass import Digests, Tokenise
from afina.loaders.text.tokenizer import Tokenizer

EOS = "<|endoftext|>"
Prepared = Callable[..., Data]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def prepared(tokenizer: Tokenizer, tmp_path: Path) -> Prepared:
    def run(source: Any, **options: Any) -> Data:
        settings = {"max_length": 64, "seed": 1, "cache_dir": tmp_path / "cache", "progress": False}
        return prepare(source, tokenizer, **settings | options)

    return run


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}?", "completion": f" answer {i}"} for i in range(count)]


def lines(token_set: TokenSet) -> list[int]:
    """The line of the file that each row was read from."""
    return [int(token_set.where(number).rpartition("line ")[2]) for number in range(len(token_set))]


def texts(token_set: TokenSet, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The whole text of each row, and what is learnt of it."""
    rows = [token_set.row(i) for i in range(len(token_set))]
    return [(tokenizer.decode(ids), tokenizer.decode(ids[trained])) for ids, trained in rows]


def test_prompts_are_read_and_completions_learnt(tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer) -> None:
    data = prepared(write(tmp_path / "a.jsonl", *pairs(40)))
    assert (len(data.train), len(data.dev)) == (36, 4)
    expected = {(f"question {i}? answer {i}{EOS}", f" answer {i}{EOS}") for i in range(40)}
    train, dev = texts(data.train, tokenizer), texts(data.dev, tokenizer)
    assert set(train) | set(dev) == expected
    assert len(train) + len(dev) == 40
    for number in range(36):
        ids, trained = data.train.row(number)
        assert (ids.dtype, trained.dtype) == (np.int32, np.bool_)
        assert len(ids) == len(trained) == data.train.lengths[number]
        assert trained.sum() == data.train.loss_tokens[number]
        i = int(tokenizer.decode(ids).split()[1].rstrip("?"))
        assert data.train.where(number) == f"{tmp_path / 'a.jsonl'}: line {i + 1}"
    report = data.report
    assert (report["rows"], report["usable"], report["train_rows"], report["dev_rows"]) == (40, 40, 36, 4)
    assert report["train_tokens"] == sum(data.train.lengths)
    assert report["dev_trained_tokens"] == sum(data.dev.loss_tokens)
    assert data.summary().splitlines()[0] == f"{tmp_path / 'a.jsonl'}: 40 rows of prompt/completion, 40 usable"


def test_source_rows_are_those_of_the_set(tmp_path: Path, prepared: Prepared) -> None:
    write(tmp_path / "a.jsonl", *pairs(20), *pairs(5))
    write(tmp_path / "b.jsonl", *({"prompt": f"other {i}", "completion": "b"} for i in range(20)))
    data = prepared([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    both = [[row.where for row in part.source_rows()] for part in (data.train, data.dev)]
    for part, found in zip((data.train, data.dev), both, strict=True):
        assert sorted(found) == sorted(part.where(i) for i in range(len(part)))
    assert len(set(both[0] + both[1])) == 40


def test_rows_can_be_selected(tmp_path: Path, prepared: Prepared) -> None:
    data = prepared(write(tmp_path / "a.jsonl", *pairs(20)))
    some, others = data.train.select(np.array([5, 2])), data.train.select(np.array([2, 5]))
    assert len(some) == 2
    assert [some.where(i) for i in range(2)] == [data.train.where(5), data.train.where(2)]
    assert some.row(0)[0].tolist() == data.train.row(5)[0].tolist()
    assert some.loss_tokens.tolist() == data.train.loss_tokens[[5, 2]].tolist()
    assert sorted(row.where for row in some.source_rows()) == sorted(some.where(i) for i in range(2))
    assert len({data.train.fingerprint, some.fingerprint, others.fingerprint}) == 3


def test_training_on_prompts_learns_all_but_the_first_token(tmp_path: Path, prepared: Prepared) -> None:
    data = prepared(write(tmp_path / "a.jsonl", *pairs(10)), train_on_prompt=True)
    for number in range(len(data.train)):
        trained = data.train.row(number)[1]
        assert not trained[0]
        assert trained[1:].all()


def test_duplicates_are_removed_before_the_split(tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer) -> None:
    rows = pairs(30)
    messy = [{"prompt": r["prompt"], "completion": r["completion"] + " \r\n", "id": i} for i, r in enumerate(rows)]
    data = prepared(write(tmp_path / "a.jsonl", *rows, *messy, *rows))
    assert (data.report["rows"], data.report["usable"], data.report["duplicates"]) == (90, 30, 60)
    assert not {text for text, _ in texts(data.train, tokenizer)} & {text for text, _ in texts(data.dev, tokenizer)}
    assert sorted(lines(data.train) + lines(data.dev)) == list(range(1, 31))
    assert "60 exact duplicates removed" in data.summary()


def test_a_set_of_digests_keeps_what_a_set_would() -> None:
    rng = np.random.default_rng(0)
    digests, known = Digests(), set()
    for size in (1, 7, 1000, 3, 1000, 1000, 50):
        batch = [bytes([*rng.integers(0, 3, 8), 0, 0, 0, 0, 0, 0, 0, rng.integers(2)]) for _ in range(size)]
        expected = []
        for digest in batch:
            expected.append(digest not in known)
            known.add(digest)
        assert digests.add(batch) == expected
    assert sum(map(len, digests.runs)) == len(known)
    assert len(digests.runs) < 8


LONG = [{"prompt": "a b c d e f g h " * 8 + "end\n", "completion": "one two"}]


def test_rows_that_are_too_long_are_dropped_and_counted(tmp_path: Path, prepared: Prepared) -> None:
    data = prepared(write(tmp_path / "a.jsonl", *pairs(10), *LONG))
    assert (data.report["usable"], data.report["dropped"], data.report["truncated"]) == (10, 1, 0)
    longest = data.report["longest"]
    assert f"1 of more than 64 tokens dropped (the longest has {longest})" in data.summary()
    assert prepared(tmp_path / "a.jsonl", max_length=longest).report["dropped"] == 0
    assert prepared(tmp_path / "a.jsonl", max_length=longest - 1).report["dropped"] == 1


def test_prompts_lose_their_start_but_completions_nothing(
    tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer
) -> None:
    long_answer = {"prompt": "short", "completion": "a b c d e f g h " * 8}
    path = write(tmp_path / "a.jsonl", *pairs(4), *LONG, long_answer)
    data = prepared(path, on_long="truncate", val_size=0.0)
    assert (data.report["usable"], data.report["dropped"], data.report["truncated"]) == (5, 1, 1)
    assert len(data.dev) == 0
    ids, trained = data.train.row(4)
    assert len(ids) == 64
    assert tokenizer.decode(ids[trained]) == f"one two{EOS}"
    assert (LONG[0]["prompt"] + LONG[0]["completion"] + EOS).endswith(tokenizer.decode(ids))
    assert "1 cut at the start to 64 tokens" in data.summary()


@pytest.mark.parametrize("spare", [0, 1])
def test_a_completion_that_just_fits_keeps_a_token_before_it(
    tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer, spare: int
) -> None:
    path = write(tmp_path / "a.jsonl", *LONG * 1)
    learnt = len(tokenizer.encode("one two", add_special=False)) + 1
    if spare:
        data = prepared(path, on_long="truncate", max_length=learnt + spare, val_size=0.0)
        assert data.train.loss_tokens.tolist() == [learnt]
    else:  # the completion would fit, but nothing would predict its first token
        with pytest.raises(DataError, match="no row is left to learn from"):
            prepared(path, on_long="truncate", max_length=learnt, val_size=0.0)


def test_truncation_keeps_the_first_token_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "bos_token", "<|system|>")
    monkeypatch.setattr(tokenizer, "bos_id", tokenizer.token_id("<|system|>"))
    monkeypatch.setattr(tokenizer, "adds_bos", True)
    path = write(tmp_path / "a.jsonl", *LONG)
    options = {"val_size": 0.0, "cache_dir": tmp_path, "progress": False, "on_long": "truncate"}
    ids, trained = prepare(path, tokenizer, max_length=20, **options).train.row(0)
    assert len(ids) == 20
    assert tokenizer.decode(ids).startswith("<|system|>")
    assert tokenizer.decode(ids[1:]) in LONG[0]["prompt"] + LONG[0]["completion"] + EOS
    assert tokenizer.decode(ids[trained]) == f"one two{EOS}"


def test_too_long_can_be_an_error(tmp_path: Path, prepared: Prepared) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(3), *LONG)
    with pytest.raises(DataError, match=r"a\.jsonl: line 4: \d+ tokens, more than max_length 64: raise max_length"):
        prepared(path, on_long="error")


def joined(token_set: TokenSet, rows: list[int]) -> list[int]:
    """The tokens of rows that a text was split into: each starts with the last token of the one before."""
    parts = [token_set.row(i)[0].tolist() for i in rows]
    assert all(one[-1] == two[0] for one, two in pairwise(parts))
    return parts[0] + [token for part in parts[1:] for token in part[1:]]


def test_texts_are_split_and_every_token_is_learnt_once(
    tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.loaders.data.files.PIECE", 300)  # the text comes in many pieces, over several batches
    monkeypatch.setattr(token_pass, "BATCH_BYTES", 2000)
    book = "".join(f"Paragraph {i} of a café's long story.\n\n" for i in range(200)).rstrip()
    (tmp_path / "a.txt").write_text(book)
    (tmp_path / "b.txt").write_text("A short one.")
    data = prepared(tmp_path / "a.txt", val_size=0.0)
    report = data.report
    assert (report["rows"], report["usable"], report["split"], report["dropped"]) == (1, 1, 1, 0)
    lengths = data.train.lengths
    assert set(lengths[:-1]) == {64}
    tokens = joined(data.train, list(range(len(data.train))))
    assert tokenizer.decode(tokens) == book + EOS
    assert data.train.loss_tokens.sum() == len(tokens) - 1
    assert "1 split into pieces of 64 tokens" in data.summary()

    rows = write(tmp_path / "a.jsonl", {"text": book}, {"text": "A short one."}, {"text": book + "!"})
    data = prepared(rows, val_size=0.3)
    sides = [set(lines(data.train)), set(lines(data.dev))]
    assert not sides[0] & sides[1]  # a row is on one side with all its pieces
    assert sides[0] | sides[1] == {1, 2, 3}
    for token_set in (data.train, data.dev):
        for line in set(lines(token_set)):
            pieces = [number for number, other in enumerate(lines(token_set)) if other == line]
            text = tokenizer.decode(joined(token_set, pieces))
            assert text == {1: book, 2: "A short one.", 3: book + "!"}[line] + EOS
    assert [row.line for row in data.train.source_rows()] == sorted(sides[0])


def test_plain_text_is_split_row_by_row_and_copies_left_out(tmp_path: Path, prepared: Prepared) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("one", "copy"):
        (folder / f"{name}.txt").write_text("All the same words. " * 400)
    (folder / "two.txt").write_text("Other words altogether. " * 400)
    data = prepared(folder)
    assert data.report["rows"] == 2
    assert 1 <= len(data.dev) < len(data.train)
    assert {data.train.where(i).split(":")[0] for i in range(len(data.train))} == {
        str(folder / "copy.txt"),
        str(folder / "two.txt"),
    }


def test_one_token_texts_are_dropped_and_counted(tmp_path: Path, prepared: Prepared, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "", "completion": EOS}, *pairs(5)]  # its only token comes first, where nothing predicts it
    data = prepared(write(tmp_path / "a.jsonl", *rows), val_size=0.0)
    assert (data.report["untrained"], data.report["usable"], len(data.train)) == (1, 5, 5)
    assert lines(data.train) == [2, 3, 4, 5, 6]
    assert [a for a, _ in texts(data.train, tokenizer)] == [f"question {i}? answer {i}{EOS}" for i in range(5)]
    with pytest.raises(
        DataError, match=r"no row is left to learn from .*1 without a token to learn dropped.*: add rows"
    ):
        prepared(write(tmp_path / "b.jsonl", rows[0]))


def test_the_split_is_seeded_stable_and_never_empty(tmp_path: Path, prepared: Prepared) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(100))
    dev = [lines(prepared(path, seed=seed).dev) for seed in (1, 1, 2)]
    assert dev[0] == dev[1] != dev[2]
    assert dev[0] == [10, 32, 37, 40, 56, 62, 76, 86, 94, 97]  # the same on every machine and with every numpy
    assert len(prepared(path, val_size=0.25).dev) == 25
    assert len(prepared(path, val_size=0.001).dev) == 1
    assert len(prepared(path, val_size=0.999).train) == 1
    with pytest.raises(DataError, match="only one usable row"):
        prepared(write(tmp_path / "b.jsonl", *pairs(1)))
    assert sorted(permutation(50, 3, -1)) == list(range(50))


def test_dev_rows_among_the_train_rows_are_refused(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write(tmp_path / "train.jsonl", *pairs(30))
    dev = write(tmp_path / "dev.jsonl", *({"prompt": f"new {i}", "completion": "x"} for i in range(5)))
    data = prepared(train, val_file=dev)
    assert (len(data.train), len(data.dev)) == (30, 5)
    assert data.summary().splitlines()[1] == f"{dev}: 5 rows of prompt/completion, 5 usable"
    both = write(
        tmp_path / "both.jsonl", *({"prompt": "n", "completion": f"{i}"} for i in range(3)), *pairs(2), *pairs(2)
    )
    with pytest.raises(DataError) as refused:
        prepared(train, val_file=both)
    assert str(refused.value).startswith(f"{both}: 2 dev rows are also in {train} (lines 4, 5): ")
    monkeypatch.setattr("afina.loaders.data.files.PIECE", 100)
    for name, words in (("a", "Once upon a time "), ("b", "Quite another one ")):  # books whose last piece is the same
        paragraphs = [words * 5 + f"{i}\n\n" for i in range(90)]
        (tmp_path / f"{name}.txt").write_text("".join(paragraphs) + "THE END, and nothing else, " * 3)
    assert len(prepared(tmp_path / "a.txt", val_file=tmp_path / "b.txt").dev) > 30
    (tmp_path / "b.txt").write_text((tmp_path / "a.txt").read_text())
    with pytest.raises(DataError, match=r"dev rows are also in .*a\.txt \(lines 1"):
        prepared(tmp_path / "a.txt", val_file=tmp_path / "b.txt")


def test_dev_rows_of_another_schema_are_refused(tmp_path: Path, prepared: Prepared) -> None:
    train = write(tmp_path / "train.jsonl", *pairs(30))
    dev = write(tmp_path / "dev.jsonl", {"text": "one", "label": "a"}, {"text": "two", "label": "b"})
    with pytest.raises(DataError) as refused:
        prepared(train, val_file=dev)
    assert str(refused.value).startswith(f"{dev}: its rows are text/label, those of {train} are prompt/completion: ")


def test_rows_that_the_chat_template_refuses(tmp_path: Path, prepared: Prepared) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, *turns[1:]]} for i in range(5)]
    rows.insert(2, {"messages": [turns[0], turns[1] | {"reasoning_content": "hm"}]})  # this template knows no thoughts
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=r"a\.jsonl: line 3: message 2 .*does not write its reasoning_content"):
        prepared(path)
    data = prepared(path, skip_bad_lines=True)
    assert (data.report["rows"], data.report["bad_lines"], data.report["usable"]) == (6, 1, 5)
    assert "1 bad lines skipped (refused by the chat template: 1)" in data.summary()


def test_the_summary_says_what_was_taken_how_and_what_was_skipped_why(tmp_path: Path, prepared: Prepared) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("Prompt;completion\r\n" + "".join(f"q {i};a {i}\r\n" for i in range(5))).encode("utf-16"))
    facts = "'Prompt' read as 'prompt'; read as UTF-16; fields separated by semicolons"
    for cached in (False, True):
        data = prepared(path, val_size=0.0)
        assert data.report["cached"] == cached
        told = f"{path}: 5 rows of prompt/completion, 5 usable; {facts}" + "; tokens taken from the cache" * cached
        assert data.summary().splitlines()[0] == told
    rows: list[Any] = [{"prompt": f"q {i}", "completion": i} for i in range(5)]
    rows += [{"prompt": "q", "completion": None}] * 2 + [{"prompt": "q", "completion": [1]}]
    data = prepared(write(tmp_path / "b.jsonl", *rows), val_size=0.0, skip_bad_lines=True)
    kinds = "completion is missing or null: 2; completion is a list: 1"
    assert data.summary().splitlines()[0] == (
        f"{tmp_path / 'b.jsonl'}: 8 rows of prompt/completion, 5 usable; 3 bad lines skipped ({kinds}); "
        "5 numbers or true/false taken as their text"
    )


def test_a_packed_text_is_split_like_a_plain_one(tmp_path: Path, prepared: Prepared) -> None:
    text = "".join(f"Paragraph {i} of a long story.\n\n" for i in range(200)).encode()
    for name, content in (("a.txt", text), ("b.txt.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
    plain, packed = prepared(tmp_path / "a.txt"), prepared(tmp_path / "b.txt.gz")
    assert len(plain.dev) == len(packed.dev) > 1
    assert [packed.dev.row(i)[0].tolist() for i in range(3)] == [plain.dev.row(i)[0].tolist() for i in range(3)]


def test_rows_with_a_character_that_no_token_spells(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *"abc"])}, merges=[]))
    backend.add_special_tokens(["</s>"])
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer(files, "x")
    rows = [{"prompt": "ab" * (i + 1), "completion": "c"} for i in range(5)]
    rows.insert(3, {"prompt": "aé", "completion": "c"})
    path = write(tmp_path / "a.jsonl", *rows)
    settings: dict[str, Any] = {"max_length": 64, "cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(DataError, match=r"a\.jsonl: line 4: x: .*'é'"):
        prepare(path, tokenizer, **settings)
    data = prepare(path, tokenizer, **settings, skip_bad_lines=True)
    assert (data.report["rows"], data.report["bad_lines"], data.report["usable"]) == (6, 1, 5)
    assert "1 bad lines skipped (a character without a token: 1)" in data.summary()


def test_fingerprints_change_with_what_they_stand_for(tmp_path: Path, prepared: Prepared) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(30))
    one = prepared(path)
    assert prepared(path).fingerprint == one.fingerprint
    changes: list[dict[str, Any]] = [
        {"seed": 2},
        {"val_size": 0.2},
        {"max_length": 63},
        {"on_long": "truncate"},
        {"train_on_prompt": True},
        {"roles": ["user"]},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
    ]
    prints = {prepared(path, **change).fingerprint for change in changes}
    write(path, *pairs(31))
    prints |= {prepared(path).fingerprint, one.fingerprint}
    assert len(prints) == len(changes) + 2
    assert one.train.fingerprint != one.dev.fingerprint


# ---------------------------------------------------------------- the cache


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The cache folders that were built, not found."""
    built: list[Path] = []
    build = Tokenise.build

    def counted(self: Tokenise, folder: Path) -> TokenCache:
        built.append(folder)
        return build(self, folder)

    monkeypatch.setattr(Tokenise, "build", counted)
    return built


def test_tokens_are_made_once(tmp_path: Path, prepared: Prepared, builds: list[Path], tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(30))
    one, two = prepared(path), prepared(path, seed=5)
    assert len(builds) == 1
    assert (one.report["cached"], two.report["cached"]) == (False, True)
    assert two.summary().splitlines()[0].endswith("; tokens taken from the cache")
    path.rename(tmp_path / "b.jsonl")  # the content counts, not the name
    three = prepared(tmp_path / "b.jsonl")
    assert len(builds) == 1
    assert texts(three.dev, tokenizer) == texts(one.dev, tokenizer)
    assert three.fingerprint == one.fingerprint
    assert [p.name for p in (tmp_path / "cache" / "tokens").iterdir()] == [builds[0].name]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "no manifest"])
@pytest.mark.parametrize("column", ["ids", "unit"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, prepared: Prepared, builds: list[Path], tokenizer: Tokenizer, damage: str, column: str
) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(30))
    expected = texts(prepared(path).train, tokenizer)
    victim = builds[0] / ("manifest.json" if "manifest" in damage else f"{column}.bin")
    content = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif damage in ("cut", "manifest"):
        victim.write_bytes(content[:-1])
    else:
        victim.unlink()
    again = prepared(path)
    assert len(builds) == 2
    assert not again.report["cached"]
    assert texts(again.train, tokenizer) == expected
    assert prepared(path).report["cached"]
    assert [p.name for p in builds[0].parent.iterdir()] == [builds[0].name]


def test_many_builders_at_once_agree(
    tmp_path: Path, prepared: Prepared, builds: list[Path], tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(60))
    gate, found = threading.Barrier(4), []

    def build() -> None:
        gate.wait()
        found.append(texts(prepared(path).dev, tokenizer))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one == found[0] for one in found)
    assert [p.name for p in builds[0].parent.iterdir()] == [builds[0].name]


def test_a_failed_build_leaves_nothing(tmp_path: Path, prepared: Prepared) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(3000)) + "{\n")
    with pytest.raises(DataError, match="line 3001"):
        prepared(path)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (500_000, 5, 5)])
def test_garbage_is_looked_for_seldom_while_rows_are_read_and_as_before_afterwards(
    before: tuple[int, int, int], tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Tokenise._encode

    def watched(self: Tokenise, batch: Any) -> None:
        seen.append(gc.get_threshold()[0])
        encode(self, batch)

    monkeypatch.setattr(Tokenise, "_encode", watched)
    usual = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        prepared(write(tmp_path / "a.jsonl", *pairs(9)))
        assert gc.get_threshold() == before
        with pytest.raises(DataError):
            prepared(write(tmp_path / "b.jsonl", *pairs(9), {}))
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*usual)
    assert seen == [max(before[0], token_pass.COLLECTED) if before[0] else 0]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, prepared: Prepared) -> None:
    path = write(tmp_path / "a.jsonl", *pairs(1500))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, before[1])
    )  # Python ignores SIGXFSZ: writes fail as on a full disk
    try:
        with pytest.raises(DataError) as refused:
            prepared(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the token cache cannot be written (File too large): free some space, or set AFINA_CACHE" in str(
        refused.value
    )
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "elsewhere"))
    prepare(write(tmp_path / "a.jsonl", *pairs(4)), tokenizer, max_length=64, progress=False)
    (folder,) = (tmp_path / "elsewhere" / "tokens").iterdir()
    cache = open_cache(folder, tokenizer.vocab_size)
    assert cache is not None
    assert {name: len(getattr(cache, name)) for name in COLUMNS if name not in ("ids", "loss_mask")} == dict.fromkeys(
        ("start", "length", "loss_tokens", "file", "line", "unit", "digest"), 4
    )
    assert cache.ids.dtype == np.uint16


def test_batches_are_small_whatever_the_file(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = Tokenise._encode

    def watched(self: Tokenise, batch: Any) -> None:
        sizes.append(len(batch))
        encode(self, batch)

    monkeypatch.setattr(Tokenise, "_encode", watched)
    monkeypatch.setattr(token_pass, "BATCH_ROWS", 100)
    monkeypatch.setattr(token_pass, "BATCH_BYTES", 5000)
    data = prepared(
        write(tmp_path / "a.jsonl", *pairs(950), *({"prompt": "q" * 400, "completion": f"{i}"} for i in range(30)))
    )
    assert data.report["usable"] == data.report["rows"] - data.report["dropped"]
    assert sum(sizes) == 980
    assert sizes[:9] == [100] * 9
    assert max(sizes[9:]) < 65

    monkeypatch.setattr("afina.loaders.data.files.PIECE", 500)
    sizes.clear()
    data = prepared(write(tmp_path / "b.jsonl", {"text": "one text of many words " * 5000}), val_size=0.0)
    assert data.train.lengths.sum() > 20_000
    assert max(sizes) <= 20  # of 500 characters: twice what a batch holds


def test_real_data(shared_data: Path, prepared: Prepared) -> None:
    data = prepared(shared_data / "support" / "banking77.csv", columns={"label": "category"}, max_length=256)
    assert data.report["rows"] == 10_003
    assert (len(data.dev), len(data.train)) == (
        round(data.report["usable"] / 10),
        data.report["usable"] - len(data.dev),
    )
