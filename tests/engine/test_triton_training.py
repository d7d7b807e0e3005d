"""The whole loop on Triton's kernels, in the interpreter or on the GPU: the losses of the same run on torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from tiny_model import saved

STEPS = 1
# `python -m afina`, with the interpreter as the tests have it.
COMMAND = """
import sys
from afina.__main__ import main
sys.path.insert(0, "tests")
import quick_interpreter
quick_interpreter.install()
sys.exit(main())
"""
# Variants that between them use every kernel and option of the model: GQA and QK-norm; window, softcap, sandwich norms
# with offset and GeGLU; LayerNorm with learned positions.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 8,
        "sliding_window": 3,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def losses(model: Path, data: Path, output: Path, backend: str) -> list[float]:
    interpreted = backend == "triton" and not torch.cuda.is_available()
    command = [sys.executable, *(["-c", COMMAND] if interpreted else ["-m", "afina"])]
    command += ["train", "--model", str(model), "--data", str(data)]
    command += ["--output_dir", str(output), "--max_steps", str(STEPS), "--batch_size", "3", "--learning_rate", "1e-3"]
    command += ["--eval_steps", str(STEPS), "--threads", "1", "--dtype", "float32"]
    environment = os.environ | {"AFINA_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    environment |= {"AFINA_CACHE": str(output.parent / "cache")}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] if "loss" in row else row["dev_loss"] for row in rows]


@pytest.mark.timeout(600)  # the interpreter takes a minute for one of them where nothing else runs
@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma2"])
def test_the_same_losses_as_on_torch(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", **MODELS[name])
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}", "completion": (" five", " lazy dog")[i % 2]} for i in range(30)]  # short: 1 ms a tile
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    triton, plain = (losses(model, data, tmp_path / backend, backend) for backend in ("triton", "torch"))
    assert len(triton) == len(plain) == STEPS + 2  # with the dev loss before and after
    assert plain[-1] < plain[0]
    assert max(abs(a - b) for a, b in zip(triton, plain)) < 1e-4
    # Both ran what they were asked to. The losses of so few steps may round to the same numbers, the weights do not.
    assert len({(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("triton", "torch")}) == 2
