"""Exported models compute what was trained, in the programs that load them; and a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_files import BNB, by_hand
from cli_server import Cli
from test_merge import FAMILIES, IDS, KINDS, add_adapter, away, random_model
from tiny_model import saved, tiny_tokenizer
from torch import Tensor

from afina.cli.main import run
from afina.engine.linear import Lora
from afina.engine.lora import save_adapter
from afina.engine.model import GPT
from afina.engine.weights import hf_tensors, load_model, save_model
from afina.errors import RunError, WeightsError
from afina.export import export as export_module
from afina.export import publication
from afina.export.compare import Rows, compare, held_out, logits
from afina.export.export import READ_BACK, export
from afina.export.merge import merge
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights.gguf import differences
from afina.loaders.weights.peft import CONFIG, WEIGHTS, AdapterFile
from afina.loaders.weights.safetensors import read_safetensors, write_safetensors

TOLERANCE = 2e-5  # fp32 at these sizes, in two programs


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"one two {i}", "completion": f" three {i} four"} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def lora_run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps whose adapter has moved the logits."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    argv = ["train", "--model", str(base), "--data", str(rows), "--output_dir", str(folder), "--method", "lora"]
    assert run([*argv, "--max_steps", "3", "--learning_rate", "1e-2", "--val_size", "0.2", "--quiet"]) == 0
    return folder


def make_adapter(base: Path, folder: Path, *, quantize: str | None = None, **options: Any) -> Path:
    """An adapter as if it had been trained on ``base``."""
    model = add_adapter(load_model(base, dtype="float32", quantize=quantize), **{"base": str(base), **options})
    save_adapter(model, tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "lora")


def together(base: Path, adapter: Path) -> GPT:
    """The model that an export must equal."""
    return load_model(base, dtype="float32", device="cpu", adapter=adapter)


@torch.no_grad()
def theirs(folder: Path, adapter: Path | None = None) -> Tensor:
    """transformers' logits, PEFT's with an adapter."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    return model.eval()(IDS).logits


# --- hf ---------------------------------------------------------------------------------------------------------------


def test_a_whole_model_is_what_transformers_loads(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert run(["export", str(base), "--to", "hf", "--output", str(out), "--json"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["output"], result["format"]) == (str(out), "hf")
    assert result["check"]["logits_relative_error"] == 0.0
    assert result["check"]["compared_on"].startswith("random tokens: no run folder")
    assert "random tokens" in said[-1]
    assert os.listdir(out.parent) == ["out"]
    assert away(theirs(out), load_model(base)(IDS)) < TOLERANCE
    check = export(base, tmp_path / "half", dtype="bf16")["check"]
    assert check["dtype"] == "bfloat16"
    assert 1e-5 < check["logits_relative_error"] <= check["limit"]
    # A bf16 model stays bf16, and exactly what it was.
    check = export(tmp_path / "half", tmp_path / "third")["check"]
    assert (check["dtype"], check["logits_relative_error"], check["rounding_share"]) == ("bfloat16", 0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_in_transformers(family: str, kind: str, tmp_path: Path) -> None:
    """Logits of the exported model there, of base and adapter here, and of base and adapter in PEFT: all the same."""
    base = tmp_path / "base"
    whole = ("embed_tokens",) if family == "llama" and kind == "lora" else ()  # the llama here ties its embeddings
    save_model(random_model(FAMILIES[family]), tiny_tokenizer(), base)
    adapter = make_adapter(base, tmp_path / "adapter", whole=whole, **KINDS[kind])
    check = export(adapter, tmp_path / "out")["check"]
    assert check["merge_error"] < TOLERANCE
    assert check["adapter_effect"] > 0.1
    assert check["greedy_unchanged"] == 1.0
    assert check["merged_into"] == str(base)
    found = theirs(tmp_path / "out")
    with torch.no_grad():
        assert away(found, together(base, adapter)(IDS)) < TOLERANCE
    assert away(found, theirs(base, adapter)) < TOLERANCE


def test_what_merging_did_and_what_rounding_did(adapter: Path, tmp_path: Path) -> None:
    checks = {dtype: export(adapter, tmp_path / dtype, dtype=dtype)["check"] for dtype in ("bf16", "fp16", "fp32")}
    for dtype, check in checks.items():
        assert check["merge_error"] < TOLERANCE < check["merge_limit"] <= 1e-3, dtype
        assert check["logits_relative_error"] <= check["limit"]
        assert check["tokens"] == 64
    assert checks["fp32"]["rounding_error"] == checks["fp32"]["rounding_share"] == 0
    assert checks["bf16"]["rounding_share"] > 0.99
    # Eight times as fine a grid, an eighth of the error.
    assert 4 < checks["bf16"]["rounding_error"] / checks["fp16"]["rounding_error"] < 16
    assert checks["fp16"]["limit"] < checks["bf16"]["limit"]
    tensors = read_safetensors(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@torch.no_grad()
def test_qlora_is_merged_into_what_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path / "base", hidden_size=64, intermediate_size=64)
    adapter = make_adapter(base, tmp_path / "adapter", quantize="nf4")
    assert run(["export", str(adapter), "--output", str(tmp_path / "out"), "--dtype", "bf16", "--json"]) == 0
    said, last = capsys.readouterr().out.split("{", 1)
    check = json.loads("{" + last)["check"]
    assert f"the adapter merged into the dequantised NF4 weights of {base}" in said
    assert check["merge_error"] < 1e-3
    # W as the adapter saw it, and the adapter's own product, written out for one matrix.
    name = "model.layers.1.self_attn.o_proj"
    w = dict(hf_tensors(load_model(base, dtype="float32", quantize="nf4")))[f"{name}.weight"]
    file = AdapterFile(adapter)
    up, down = (file.read(file.lora[name][kind]) for kind in "BA")
    expected = w + 12 / 4 * up @ down
    found = read_safetensors(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(found, expected.bfloat16())
    original = read_safetensors(base / "model.safetensors")[f"{name}.weight"]
    assert away(original + 12 / 4 * up @ down, expected) > 1e-2


@torch.no_grad()
def test_a_base_that_is_stored_as_nf4_comes_out_dense(tmp_path: Path) -> None:
    base = by_hand(saved(tmp_path / "plain", hidden_size=64, intermediate_size=64), tmp_path / "base", config=BNB)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(model := load_model(base))
    assert "quantization_config" not in model.hf_config
    for source, expected in ((base, load_model(base)), (adapter, together(base, adapter))):
        check = export(source, tmp_path / source.name / "out")["check"]
        assert check["merge_error"] < TOLERANCE
        config = json.loads((tmp_path / source.name / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        assert away(theirs(tmp_path / source.name / "out"), expected(IDS)) < TOLERANCE


def test_template_stop_tokens_and_generation_config_travel_along(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = tiny_tokenizer()
    stops = [tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|end|>"), tokenizer.token_id("<|user|>")]
    adapter = make_adapter(base, tmp_path / "adapter")
    generation = {"eos_token_id": stops, "temperature": 0.6, "do_sample": True}
    (adapter / "generation_config.json").write_text(json.dumps(generation))
    (adapter / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "one two"}]
    for to in ("hf", "peft"):
        export(adapter, tmp_path / to, to=to)
        assert json.loads((tmp_path / to / "generation_config.json").read_text()) == generation
        assert (tmp_path / to / "chat_template.jinja").read_text() == template
        found = load_tokenizer(tmp_path / to)
        assert found.eos_ids == sorted(stops)
        assert found.render(messages, add_generation_prompt=True) == "<|user|>one two<|end|><|assistant|>"
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>one two<|end|><|assistant|>"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == stops


def test_an_adapter_without_tokenizer_files_has_its_bases(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    for path in adapter.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    base = base.rename(tmp_path / "moved")
    try:
        for to in ("hf", "peft"):
            export(adapter, tmp_path / to, to=to, base=str(base))
            assert load_tokenizer(tmp_path / to).encode("one two") == load_tokenizer(base).encode("one two")
    finally:
        base.rename(json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"])


# --- The rows that it is compared on ----------------------------------------------------------------------------------


def test_the_rows_are_the_runs_own_dev_rows(
    base: Path, rows: Path, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = export(lora_run, tmp_path / "out")["check"]
    assert check["compared_on"] == "the run's dev rows"
    assert check["rows"] == 8
    tokenizer = load_tokenizer(base)
    data = prepare(str(rows), tokenizer, max_length=1024, val_size=0.2, seed=42, progress=False)
    dev = {tuple(data.dev.row(i)[0].tolist()) for i in range(len(data.dev))}
    train = {tuple(data.train.row(i)[0].tolist()) for i in range(len(data.train))}
    found = held_out(lora_run / "best", tokenizer, None, 96)
    assert {tuple(ids.tolist()) for ids in found.ids} <= dev - train
    assert check["tokens"] == sum(map(len, found.ids))
    assert len(found.texts) == 2 * len(dev)
    assert [len(ids) for ids in held_out(lora_run / "best", tokenizer, None, 3).ids] == [3] * 8
    monkeypatch.setattr("afina.export.compare.TOKENS", 33)
    assert [len(ids) for ids in held_out(lora_run / "best", tokenizer, None, 96).ids] == [4] * 8


def test_other_rows_and_rows_that_are_gone(
    base: Path, rows: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        '{"prompt": "one two three", "completion": "four"}\n'
        + json.dumps({"prompt": "the lazy dog " * 90, "completion": "x"})
    )  # longer than the model reads
    check = export(lora_run, tmp_path / "out", data=str(few))["check"]
    assert (check["compared_on"], check["rows"]) == (f"rows of {few}", 2)
    assert run(["export", str(lora_run), "--output", str(tmp_path / "x"), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    away_now = rows.rename(tmp_path / "rows.jsonl")
    try:
        assert run(["export", str(lora_run), "--output", str(tmp_path / "gone")]) == 0
        assert "random tokens: the run's dev rows cannot be read" in capsys.readouterr().out
    finally:
        away_now.rename(rows)


@torch.no_grad()
def test_of_many_logits_some_are_compared(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(base)
    rows = Rows([IDS[0, :7], IDS[0, 3:4], IDS[0, 5:40]], [], "here")
    whole = logits(model, rows)
    assert len(whole) == 43
    assert torch.equal(whole[:7], model(rows.ids[0][None])[0])
    monkeypatch.setattr("afina.export.compare.KEPT", 15 * model.config.vocab_size)
    torch.testing.assert_close(logits(model, rows), whole[::3])


def test_the_comparison_itself() -> None:
    expected = torch.tensor([[1.0, -4.0, 2.0], [0.0, 1.0, 3.0]])
    found = expected.clone()
    found[0, 0] += 2
    likeness = compare(found, expected)
    assert (likeness.error, likeness.same) == (0.5, 0.5)
    found[1, 1] = torch.nan
    assert not compare(found, expected).error <= 1e9


# --- What must not be published ---------------------------------------------------------------------------------------

Failure = Callable[..., str]


@pytest.fixture
def failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Failure:
    """A failed command: its status, one line, and nothing new on the disk; returns the line."""

    def check(status: int, *argv: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run([str(word) for word in argv]) == status
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        assert line.startswith("afina: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return check


def test_a_model_that_computes_something_else_is_not_published(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    seen: list[bool] = []

    def broken(model: GPT, *rest: Any) -> None:
        model.norm.weight.data[0] += 0.5
        save_model(model, *rest)
        seen.append((tmp_path / "new" / "out").exists())

    monkeypatch.setattr(export_module, "save_model", broken)
    for source in (base, adapter):
        assert "logits differ by" in failure(1, "export", source, "--output", tmp_path / "new" / "out")
    assert seen == [False, False]


def test_a_tensor_that_reached_the_disk_otherwise_is_not_published(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    """A change too small for the logits of a rounded model to show."""

    def broken(model: GPT, tokenizer: Any, folder: Path) -> None:
        save_model(model, tokenizer, folder)
        tensors = read_safetensors(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[3, 5] ^= 1
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})

    monkeypatch.setattr(export_module, "save_model", broken)
    told = failure(1, "export", adapter, "--output", tmp_path / "out", "--dtype", "bf16")
    assert "model.layers.0.mlp.up_proj.weight read back from" in told


MERGE = Lora.merge


def without_scale(lora: Lora, weight: Tensor) -> Tensor:
    lora.parts = [part._replace(scale=1.0) for part in lora.parts]
    return MERGE(lora, weight)


def without_magnitude(lora: Lora, weight: Tensor) -> Tensor:
    lora.magnitude = None
    return MERGE(lora, weight)


def into_the_other_part(lora: Lora, weight: Tensor) -> Tensor:
    """gate's product to up, and the other way round."""
    lora.parts = [
        part._replace(start=other.start, stop=other.stop) for part, other in zip(lora.parts, lora.parts[::-1])
    ]
    return MERGE(lora, weight)


def not_at_all(lora: Lora, weight: Tensor) -> Tensor:
    return weight.clone()


def not_a_number(lora: Lora, weight: Tensor) -> Tensor:
    return weight * torch.nan


@pytest.mark.parametrize("strength", [0.3, 1e-4])
@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        (without_scale, {}),
        (without_magnitude, {"dora": True}),
        (into_the_other_part, {"targets": ("gate_proj", "up_proj")}),
        (not_at_all, {}),
        (not_a_number, {}),
    ],
)
def test_a_wrong_merge_shows_also_where_the_adapter_is_small(
    wrong: Callable[..., Tensor], options: dict[str, Any], strength: float, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, failure: Failure,
) -> None:  # fmt: skip
    """The smaller one moves them by 0.1%, a tenth of what rounding to bfloat16 does here."""
    make_adapter(base, tmp_path / "adapter", strength=strength, **options)
    monkeypatch.setattr(Lora, "merge", wrong)
    told = failure(1, "export", tmp_path / "adapter", "--output", tmp_path / "out", "--dtype", "bf16")
    assert "merged in float32, the logits differ by" in told


def test_rounding_that_drowns_the_adapter_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", strength=1e-4)
    for dtype, said in (("bf16", True), ("fp32", False)):
        assert run(["export", str(adapter), "--output", str(tmp_path / dtype), "--dtype", dtype]) == 0
        out = capsys.readouterr().out
        assert ("rounding moves the logits more than the adapter does: use --dtype float32" in out) == said


def test_merging_twice_or_into_another_base_is_refused(
    base: Path, adapter: Path, tmp_path: Path, failure: Failure
) -> None:
    export(adapter, tmp_path / "merged")
    other = saved(tmp_path / "other", rms_norm_eps=1e-6)
    with torch.no_grad():
        model = load_model(other)
        model.layers[0].attn.o.weight[3, 4] += 1e-3
        save_model(model, tiny_tokenizer(), other)
    for wrong in (tmp_path / "merged", other):
        for to in ("hf", "gguf", "peft"):
            told = failure(2, "export", adapter, "--to", to, "--output", tmp_path / "out", "--base", wrong)
            assert f"{wrong} is not the model that {adapter} was trained on" in told
            assert "--base" in told


def test_an_adapter_that_does_not_know_its_base_is_merged_and_that_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    write_safetensors(adapter / WEIGHTS, read_safetensors(adapter / WEIGHTS), {"format": "pt"})  # as PEFT does
    assert run(["export", str(adapter), "--output", str(tmp_path / "out")]) == 0
    assert "the adapter does not say which weights it was trained on" in capsys.readouterr().out


def test_adapters_that_are_not_finite_are_refused(base: Path, tmp_path: Path, failure: Failure) -> None:
    make_adapter(base, tmp_path / "adapter")
    file = AdapterFile(tmp_path / "adapter")
    tensors = read_safetensors(tmp_path / "adapter" / WEIGHTS)
    next(iter(tensors.values()))[1, 1] = torch.inf
    write_safetensors(tmp_path / "adapter" / WEIGHTS, tensors, file.metadata)
    for to in ("hf", "gguf", "peft"):
        told = failure(2, "export", tmp_path / "adapter", "--to", to, "--output", tmp_path / "out")
        assert "holds NaN or Inf" in told


def test_weights_too_large_for_float16_are_refused(base: Path, tmp_path: Path, failure: Failure) -> None:
    model = load_model(base)
    with torch.no_grad():
        model.layers[0].attn.o.weight[0, 0] = 7e4
    save_model(model, tiny_tokenizer(), tmp_path / "large")
    for flags in (("--dtype", "fp16"), ("--to", "gguf")):
        told = failure(2, "export", tmp_path / "large", "--output", tmp_path / "out", *flags)
        assert "o_proj.weight: holds 70000, too large for f" in told
        assert "bfloat16" in told


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("base", [], "the following arguments are required: --output"),
        ("base", ["--output", "TMP/x", "--to", "peft"], "is a whole model and has no adapter: use --to hf"),
        ("base", ["--output", "TMP/x", "--base", "afina-tiny"], "--base is for adapters"),
        ("base", ["--output", "TMP/x", "--base_name", "b"], "--base_name is what --to peft names as the base"),
        ("base", ["--output", "TMP/x", "--to", "pef"], "(did you mean 'peft'?)"),
        ("base", ["--output", "TMP/x", "--dtype", "int8"], "with --to hf expected auto, float32"),
        ("base", ["--output", "TMP/x", "--dtype", "q8_0"], "with --to hf expected auto, float32"),
        ("adapter", ["--output", "TMP/x", "--dtype", "bf16", "--to", "peft"], "with --to peft expected auto"),
        ("adapter", ["--output", "TMP/x", "--data", "y", "--to", "peft"], "--data is not for --to peft"),
        ("adapter", ["--output", "TMP/x", "--base", "TMP/none"], "no such model"),
        ("adapter", ["--output", "TMP/x", "--base", "ADAPTER"], "is an adapter too"),
        ("base", ["--output", "TMP/file"], "already exists"),
        ("base", ["--output", "TMP/file/x/y"], "file is no folder that can be written to: choose another --output"),
        ("base", ["--output", "TMP/link"], "already exists"),
        ("base", ["--output", "TMP"], "already exists"),
    ],
)
def test_wrong_requests(
    source: str, flags: list[str], words: str, base: Path, adapter: Path, tmp_path: Path, failure: Failure
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    given = [flag.replace("TMP", str(tmp_path)).replace("ADAPTER", str(adapter)) for flag in flags]
    assert words in failure(2, "export", {"base": base, "adapter": adapter}[source], *given)


# --- peft -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_alone_bit_for_bit(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", whole=("embed_tokens",), **KINDS[kind])
    result = export(adapter, tmp_path / "out", to="peft", base_name="owner/name")
    assert result["check"] | {"tensors": 0} == {"same_bits": True, "tensors": 0, "base": "owner/name"}
    one, other = (read_safetensors(folder / WEIGHTS) for folder in (adapter, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert len(one) == result["check"]["tensors"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "out"))
    assert after == before | {"base_model_name_or_path": "owner/name"}
    assert AdapterFile(tmp_path / "out").metadata == AdapterFile(adapter).metadata
    assert load_tokenizer(tmp_path / "out").encode("one two") == tiny_tokenizer().encode("one two")
    with torch.no_grad():
        assert away(theirs(base, tmp_path / "out"), together(base, adapter)(IDS)) < TOLERANCE
    # Unless another name is asked for, it names the base that it was trained on; what only PEFT reads stays.
    config = before | {"exclude_modules": ["nothing"], "peft_version": "0.1"}
    (adapter / CONFIG).write_text(json.dumps(config))
    assert export(adapter, tmp_path / "again", to="peft")["check"]["base"] == str(base)
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == config


def test_an_adapter_that_reached_the_disk_otherwise_is_not_published(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    def broken(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = next(iter(tensors))
        write_safetensors(path, tensors | {name: tensors[name] * (1 + 1e-7)}, metadata)

    monkeypatch.setattr(export_module, "write_safetensors", broken)
    assert "is not the one in" in failure(1, "export", adapter, "--to", "peft", "--output", tmp_path / "out")


# --- gguf -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bf16", "q8_0", "fp32"])
@torch.no_grad()
def test_one_file_of_base_and_adapter(
    dtype: str, lora_run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    assert run(["export", str(lora_run), "--to", "gguf", "--output", str(out), "--dtype", dtype, "--json"]) == 0
    said, last = capsys.readouterr().out.split("{", 1)
    check = json.loads("{" + last)["check"]
    assert sorted(os.listdir(tmp_path)) == ["model.Modelfile", "model.README.md", "model.gguf"]
    assert f"{check['tensors']} tensors" in said
    assert check["texts_with_same_ids"] == 2 * 12  # prompts and whole texts of the dev rows
    assert check["merge_error"] < TOLERANCE
    kind = {"auto": "F16", "bf16": "BF16", "q8_0": "Q8_0", "fp32": "F32"}[dtype]
    assert check["tensor_relative_error"] <= READ_BACK[kind]
    assert (check["tensor_relative_error"] == 0) == (dtype == "fp32")
    # The merged weights, by llama.cpp's names.
    export(lora_run, tmp_path / "hf", dtype="float32")
    merged = read_safetensors(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    tensor = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_down.weight")
    found = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert away(found, merged) <= READ_BACK[kind]
    assert away(found, read_safetensors(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]) > 0.02


def test_a_folder_with_the_file(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(base, tmp_path / "out", to="gguf", dtype="q8_0")
    assert sorted(os.listdir(tmp_path / "out")) == ["Modelfile", "model-q8_0.gguf"]
    check = export(base, tmp_path / "half", to="gguf")["check"]
    assert sorted(os.listdir(tmp_path / "half")) == ["Modelfile", "model-float16.gguf"]
    assert check["texts_with_same_ids"] == 4
    assert "FROM ./model-float16.gguf" in (tmp_path / "half" / "Modelfile").read_text().splitlines()


# --- What lies beside the weights -------------------------------------------------------------------------------------


def test_the_modelfile_of_a_run_is_proven_on_its_rows(
    lora_run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of prompts are sent as they are; conversations as the chat template has them."""
    assert run(["export", str(lora_run), "--to", "gguf", "--output", str(tmp_path / "out"), "--json"]) == 0
    said, last = capsys.readouterr().out.split("{", 1)
    check = json.loads("{" + last)["check"]
    assert (check["ollama_template"], check["ollama_rows"], check["ollama_rows_same"]) == (True, 12, 12)
    assert "its template writes what training saw, as 12 of 12 rows show" in said
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
    data = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    data.write_text("".join(json.dumps({"messages": talk * times}) + "\n" for times in (1, 2, 3)))
    assert run(["export", str(base), "--to", "gguf", "--output", str(tmp_path / "chat"), "--data", str(data)]) == 0
    assert "as 3 of 3 rows show" in capsys.readouterr().out
    assert "{{- range .Messages }}" in (tmp_path / "chat" / "Modelfile").read_text()


def test_nothing_is_half_there_where_a_companion_cannot_be_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("m.README.md", "m.Modelfile"):
        (tmp_path / name).write_text("another's")
        with pytest.raises(RunError, match=f"{name} already exists and is left as it is"):
            export(base, tmp_path / "m.gguf", to="gguf")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()

    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    real = publication.put
    places: list[str] = []

    def put(working: Path, path: Path, **options: Any) -> None:
        places.append(path.name)
        (fails if path.name == "m.gguf" else real)(working, path, **options)

    monkeypatch.setattr(publication, "put", put)
    with pytest.raises(OSError, match="No space"):
        export(base, tmp_path / "m.gguf", to="gguf")
    assert places[-1] == "m.gguf"
    assert "m.Modelfile" in places
    assert not list(tmp_path.iterdir())


def test_cards_may_be_changed_and_a_card_that_was_there_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    (source / "README.md").write_text("---\nlicense: mit\n---\nWritten by hand.\n")
    assert run(["export", str(source), "--output", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr().out
    assert f"README.md is a new model card; {source / 'README.md'} was read, and is not carried over" in said
    assert (source / "README.md").read_text().endswith("Written by hand.\n")
    card = tmp_path / "out" / "README.md"
    assert "license: mit" in card.read_text()
    card.write_text("changed")
    assert run(["export", str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 0


# --- gguf: what goes wrong --------------------------------------------------------------------------------------------


def test_a_gguf_file_that_says_something_else_is_not_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    pytest.importorskip("gguf")
    real = export_module.write_gguf
    request = ("export", base, "--to", "gguf", "--output", tmp_path / "out.gguf")

    def spoilt(name: str, value: float) -> Callable[..., None]:
        def write(path: Path, hf: dict[str, Any], tensors: Any, *rest: Any, **options: Any) -> None:
            def others() -> Iterator[tuple[str, Tensor]]:
                for key, tensor in tensors():
                    yield key, tensor + value if key == name else tensor

            real(path, hf, others, *rest, **options)

        return write

    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        monkeypatch.setattr(export_module, "write_gguf", spoilt(name, 0.01))
        assert f"{name} read back as F" in failure(1, *request)

    def differ(*arguments: Any) -> int:
        raise ValueError("out.gguf: the ids of 'x' differ")

    monkeypatch.setattr(export_module, "write_gguf", real)
    monkeypatch.setattr(export_module, "compare_vocabulary", differ)
    assert "the file's vocabulary is not the tokenizer's (out.gguf: the ids of 'x' differ)" in failure(1, *request)


def test_what_gguf_has_no_place_for_is_refused_before_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    pytest.importorskip("gguf")
    save_model(random_model(FAMILIES["phi3"]), tiny_tokenizer(), tmp_path / "phi3")
    monkeypatch.setattr(export_module, "load_model", None)
    told = failure(2, "export", tmp_path / "phi3", "--to", "gguf", "--output", tmp_path / "out")
    assert "model_type = 'phi3'" in told


def test_tensors_of_a_gguf_file_that_are_missing(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = load_model(base)
    export(base, tmp_path / "out.gguf", to="gguf")
    tensors = dict(hf_tensors(model))
    found = list(differences(tmp_path / "out.gguf", model.hf_config, tensors.items()))
    assert [each.name for each in found] == list(tensors)
    assert {each.kind for each in found} == {"F16", "F32"}
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(WeightsError, match=r"down_proj.weight has shape"):
        list(differences(tmp_path / "out.gguf", model.hf_config, [(name, tensors[name][:-1])]))


# --- Faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    server = Cli(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, resource.RLIM_INFINITY))"
# The process dies as soon as the file is written; as soon as all is compared.
KILLED = """
import os, signal
from afina.export import export
real = export.{name}

def dies(*arguments, **options):
    result = real(*arguments, **options)
    os.kill(os.getpid(), signal.{signal})
    return result

export.{name} = dies
"""


@pytest.mark.parametrize(("to", "size"), [("hf", 20_000), ("hf", 3_000), ("peft", 5_000), ("gguf", 20_000)])
def test_a_full_disk_leaves_nothing(to: str, size: int, cli: Cli, adapter: Path) -> None:
    ended = cli.run("export", adapter, "--to", to, "--output", "deep/out", prelude=FULL.replace("{bytes}", str(size)))
    assert ended.status == 1, ended.stderr
    assert "File too large" in ended.error or "could not be written in full" in ended.error
    assert not (cli.folder / "deep").exists()


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("hf", "save_model"),
        ("hf", "compare"),
        ("peft", "write_safetensors"),
        ("gguf", "write_gguf"),
        ("gguf", "differences"),
    ],
)
def test_a_kill_leaves_nothing_under_the_name(to: str, name: str, cli: Cli, adapter: Path) -> None:
    out = cli.folder / f"{to}-{name}"
    prelude = KILLED.replace("{name}", name)
    ended = cli.run("export", adapter, "--to", to, "--output", out, prelude=prelude.replace("{signal}", "SIGKILL"))
    assert ended.status == -signal.SIGKILL
    assert not out.exists()
    left = list(cli.folder.glob(f"{out.name}.tmp-*"))
    assert len(left) == (name != "compare")  # which is first called before anything is written
    ended = cli.run("export", adapter, "--to", to, "--output", out)
    assert ended.status == 0, ended.stderr
    assert out.exists()
    for path in left:
        assert f"{path} removed: an export to {out} that was killed had left it" in ended.stderr
    assert not list(cli.folder.glob(f"{out.name}.tmp-*"))


def test_what_others_are_working_on_is_left_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports to one place at a time: none removes the other's folder, nor what is called much like it."""
    others = [tmp_path / name for name in ("out.tmp-x", "outer.tmp-1", "out.old-1", "other.tmp-2")]
    for path in others:
        path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.tmp-3").symlink_to("elsewhere")
    stale = tmp_path / "out.tmp-4"
    stale.write_text("a file of an earlier version")

    def meanwhile() -> None:
        with publication.Publication(tmp_path / "out", "hf").working() as working:
            working.mkdir()
            export(base, tmp_path / "out")
            assert working.is_dir()

    with pytest.raises(RunError, match="already exists"):
        meanwhile()
    assert not stale.exists()
    assert f"{stale} removed" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").is_file()
    assert all(path.is_dir() for path in others)
    assert (tmp_path / "out.tmp-3").is_symlink()
    assert not list(tmp_path.glob("out.tmp-????????????????"))


def test_ctrl_c_leaves_nothing(cli: Cli, adapter: Path) -> None:
    prelude = KILLED.replace("{name}", "save_model").replace("{signal}", "SIGINT")
    # Where the tests run in the background of a shell, the signal is ignored.
    prelude = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + prelude
    ended = cli.run("export", adapter, "--output", "stopped", prelude=prelude)
    assert ended.status == 130
    assert not list(cli.folder.glob("stopped*"))


def test_a_name_that_is_taken_meanwhile_is_left_as_it_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Any:
        (tmp_path / "out.gguf").write_text("another's")
        return differences(*arguments)

    pytest.importorskip("gguf")
    monkeypatch.setattr(export_module, "differences", slow)
    with pytest.raises(RunError, match="already exists"):
        export(base, tmp_path / "out.gguf", to="gguf")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another's"]


def test_large_models_say_what_takes_so_long(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for large, told in ((1 << 40, False), (0, True)):
        monkeypatch.setattr(export_module, "LARGE", large)
        export(adapter, tmp_path / f"{large}")
        steps = capsys.readouterr().err.splitlines()
        assert bool(steps) == told
    assert len(steps) >= 5
    assert steps[0].startswith("reading the base's files")
