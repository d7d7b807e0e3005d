"""SmolLM2-135M-Instruct, a real pretrained model: its training beside transformers' and PEFT's, and its exports.

That it loads and answers as in transformers is tests/loaders/weights/test_source.py's; here, where what is computed is
compared and not read, its first layers do. Skipped where the package index is not reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_files
import torch
from hf_models import transformers
from torch import Tensor

import afina
from afina.cli.main import run
from afina.engine.lora import new_adapter, save_adapter
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.optim import AdamW
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.render import Example, render_example
from afina.loaders.weights.peft import AdapterConfig

REVIEWS = [
    ("a film as warm as fresh bread", "positive"),
    ("the twist is visible from space", "negative"),
    ("every frame looks as if somebody cared", "positive"),
]
STEPS = 3
LAYERS = 6  # of 30


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's first layers, with its embedding, last norm and tokenizer, as transformers and Afina read them."""
    folder = tmp_path_factory.mktemp("smollm2")
    model = afina.load_model(real_files.smollm2(), dtype="float32", device="cpu")
    model.hf_config |= {"num_hidden_layers": LAYERS}
    model.config, model.layers = ModelConfig.from_hf(model.hf_config), model.layers[:LAYERS]
    afina.save_model(model, afina.load_tokenizer(real_files.smollm2()), folder)
    return folder


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Token ids (1, T) and labels of one conversation a step, -100 but for the answer."""
    tokenizer = afina.load_tokenizer(real_files.smollm2())
    rows = []
    for text, word in REVIEWS:
        messages = ({"role": "user", "content": text}, {"role": "assistant", "content": word})
        (ids,), (mask,) = encode_rendered(tokenizer, [render_example(tokenizer, Example(messages=messages))])
        ids_ = torch.tensor(ids)[None].long()
        rows.append((ids_, torch.where(torch.tensor(mask)[None], ids_, -100)))
    return rows


@pytest.fixture(params=[None, "nf4"], ids=["dense", "nf4"])
def base(request: pytest.FixtureRequest, short: Path, tmp_path: Path) -> tuple[str | None, Path]:
    """How the weights are held, and what they then are, as transformers reads them."""
    if request.param is None:
        return None, short
    afina.save_model(ours(short, request.param), None, tmp_path / "base")
    return request.param, tmp_path / "base"


def losses_of(
    model: Any, loss: Callable[[Tensor, Tensor], Tensor], batches: list[tuple[Tensor, Tensor]], step: Any, clear: Any
) -> list[float]:
    model.train()
    found = []
    for ids, labels in batches[:STEPS]:
        value = loss(ids, labels)
        value.backward()
        step()
        clear()
        found.append(value.item())
    return found


def ours(place: Path, quantize: str | None = None) -> GPT:
    return afina.load_model(place, dtype="float32", device="cpu", quantize=quantize)


def steps_of(model: GPT, batches: list[tuple[Tensor, Tensor]], lr: float) -> list[float]:
    optimizer = AdamW(model, decay=(), weight_decay=0.0)
    return losses_of(model, model.loss, batches, lambda: optimizer.step(lr), optimizer.zero_grad)


def steps_of_theirs(model: Any, batches: list[tuple[Tensor, Tensor]], lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    return losses_of(
        model, lambda ids, labels: model(ids, labels=labels).loss, batches, optimizer.step, optimizer.zero_grad
    )


def test_steps_with_adapters_are_pefts(
    short: Path, base: tuple[str | None, Path], batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    """LoRA on the dense weights, and on a base in 4 bits beside PEFT on what those 4 bits stand for."""
    peft = pytest.importorskip("peft")
    quantize, folder = base
    model = ours(short, quantize)
    new_adapter(model, AdapterConfig(base=str(folder), r=8, alpha=16.0), targets=("all-linear",), seed=1)
    save_adapter(model, None, tmp_path / "start")
    found = steps_of(model, batches, 1e-3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "start"), is_trainable=True)
    expected = steps_of_theirs(theirs, batches, 1e-3)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] > 1.0  # it has not seen these rows


def test_steps_of_all_weights_are_transformers(short: Path, batches: list[tuple[Tensor, Tensor]]) -> None:
    found = steps_of(ours(short), batches, 1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    assert found == pytest.approx(steps_of_theirs(theirs, batches, 1e-5), rel=1e-4)


def test_exports_say_what_the_run_says(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a GGUF file through a LoRA run to hf, peft and gguf, each loaded again."""
    file = tmp_path / "short.gguf"
    assert run(["export", str(short), "--to", "gguf", "--dtype", "float16", "--output", str(file)]) == 0
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Review {i}: it is", "completion": f" {word}."} for i, (_, word) in enumerate(REVIEWS * 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = ["--method", "lora", "--max_steps", "2", "--batch_size", "2", "--eval_steps", "2", "--threads", "1"]
    where = ["--model", str(file), "--data", str(data), "--output_dir", str(tmp_path / "run")]
    assert run(["train", *where, *trained]) == 0, capsys.readouterr().err
    ids = torch.tensor([afina.load_tokenizer(file).encode("Review 1: it is")])
    with torch.no_grad():
        expected = ours(tmp_path / "run")(ids)
    largest = expected.abs().max()
    for kind, dtype, limit in (("hf", "float32", 1e-5), ("peft", None, 1e-6), ("gguf", "float16", 5e-3)):
        place = tmp_path / (f"out-{kind}" + ".gguf" * (kind == "gguf"))
        words = ["export", str(tmp_path / "run"), "--to", kind, "--output", str(place)]
        assert run(words + (["--dtype", dtype] if dtype else [])) == 0, capsys.readouterr().err
        with torch.no_grad():
            again = ours(place)(ids)
        assert (again - expected).abs().max() / largest < limit, kind


def test_greedy_text_is_llama_cpps(tmp_path: Path) -> None:
    """On the values of the file's blocks in float32: with the blocks themselves llama.cpp rounds activations to 8 bits,
    which decides between two words as likely as "The" and "L" are here."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "float32.gguf"
    assert run(["export", str(real_files.smollm2()), "--to", "gguf", "--dtype", "float32", "--output", str(path)]) == 0
    model, tokenizer = ours(path).eval(), afina.load_tokenizer(path)
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    theirs = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, n_threads=1, logits_all=True, **cache)
    for question in ("What is the capital of France?", "Name three colours."):
        text = tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special=False)
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        found = torch.tensor(theirs.scores[: len(ids)])
        assert (logits - found).abs().max() < 1e-4 * logits.abs().max()
        theirs.reset()
        answer = theirs.create_completion(ids, max_tokens=16, temperature=0.0)["choices"][0]["text"]
        assert answer == afina.generate(model, tokenizer, text, max_new_tokens=16, temperature=0.0)
