"""What loading a model costs: from a GGUF file and from safetensors, ours beside transformers'.

    python benchmarks/bench_load.py MODEL.gguf                # or a wheel with one; anything that load_model takes
    python benchmarks/bench_load.py MODEL.gguf --dtype bfloat16 --repeats 5 | tee -a benchmarks/results/load_cpu.jsonl

The model is first saved in the HF layout, dequantised, in the dtype that is asked for; then each of the four loads runs
in a process of its own, in turn. On the clock are the load, config included, and one sum over each parameter, since
transformers maps safetensors into memory and leaves their reading for later; before it, the imports and a read of the
file, so that its bytes are in the page cache for all. Memory is the peak of the resident set during the load above what
it was before, and its ratio to the bytes of the parameters. The smallest time and peak of each count. All logits on the
same 32 tokens must be those of the first within 1e-4. One JSON line a load goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LOADS = ("afina gguf", "afina safetensors", "transformers gguf", "transformers safetensors")
IDS = torch.arange(32)[None]


def memory(key: str) -> int:
    """Bytes, by /proc: VmRSS is what is resident now, VmHWM the most there was since it was cleared."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def child(load: str, path: Path, dtype: str, logits: Path) -> dict[str, Any]:
    """Load once in this process; leave the logits in ``logits``."""
    engine = load.split()[0]
    if engine == "afina":
        from afina.engine.weights import load_model
    else:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        # What it imports on the first load is not loading.
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        transformers.AutoModelForCausalLM.from_config(config)
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with file.open("rb") as data:
            while data.read(2**24):
                pass
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    model: Any
    if engine == "afina":
        model = load_model(path, dtype=dtype, device="cpu")
    else:
        place, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        kind = getattr(torch, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=kind, **options).eval()
    for parameter in model.parameters():
        parameter.detach().sum()
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    with torch.no_grad():
        found = model(IDS)
    torch.save(getattr(found, "logits", found).float(), logits)
    return {
        "load": load,
        "seconds": round(seconds, 3),
        "peak_mb": round(peak / 1e6, 1),
        "model_mb": round(held / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("LOAD", "LOGITS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(child(args.child[0], Path(args.model), args.dtype, Path(args.child[1]))))
        return
    import afina
    from afina.loaders.weights.hub import resolve

    source = resolve(args.model)
    with tempfile.TemporaryDirectory() as place:
        folder, logits = Path(place) / "hf", Path(place) / "logits"
        afina.save_model(afina.load_model(source, dtype=args.dtype, device="cpu"), None, folder)
        runs: dict[str, list[dict[str, Any]]] = {load: [] for load in LOADS}
        expected = None
        for _ in range(args.repeats):
            for load, results in runs.items():
                path = source if load.endswith("gguf") else folder
                command = [sys.executable, __file__, str(path), "--dtype", args.dtype, "--child", load, str(logits)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                found = torch.load(logits, weights_only=True)
                expected = found if expected is None else expected
                results[-1]["error"] = float((found - expected).abs().max() / expected.abs().max())
                limit = 1e-4 if args.dtype == "float32" else 5e-2
                assert results[-1]["error"] < limit, results[-1]
    for load, results in runs.items():
        best = {key: min(run[key] for run in results) for key in ("seconds", "peak_mb", "model_mb")}
        row = {"load": load, **best, "peak_over_model": round(best["peak_mb"] / best["model_mb"], 3)}
        row |= {"error": max(run["error"] for run in results), "dtype": args.dtype, "runs": args.repeats, "threads": 1}
        row |= {"model": source.name, "file_mb": round(source.stat().st_size / 1e6, 1) if source.is_file() else None}
        row |= {"machine": platform.machine(), "python": platform.python_version()}
        row |= {name: version(name) for name in ("torch", "transformers")}
        row["command"] = f"python benchmarks/bench_load.py {source.name} --dtype {args.dtype} --repeats {args.repeats}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
