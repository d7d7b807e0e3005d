"""Generation on a CPU beside transformers' `generate`: the same weights, prompts, threads and greedy texts.

    python benchmarks/bench_generate.py [--models afina-tiny smollm2-135m-instruct] [--rounds 5] [--threads 1]
        [--rounded]

Four cases, in float32, without an end token, so that both write as many tokens: `decode` is one row of 64 tokens
behind a prompt of 32 (tokens/s after the first); `first` is the seconds to the first token of a prompt of 256; `rows`
is 16 rows with prompts of 8 to 128 tokens, of which 8 to 96 are wanted (rows/s); `shared` 16 questions of 12 to 27
tokens behind one system message of 192, of which 16 tokens are wanted. Theirs pads prompts on the left and
runs until the longest row is done; ours lets rows leave. Both run in turn (A B A B ...) in one process. Memory is that
of a process of its own for each: the peak from loading model and tokenizer to the end of the 16 rows, less what it had
before.
One JSON line for each model and case: medians, the median of the rounds' ratios (ours / theirs), and how many texts are
equal, token for token. `--rounded` rounds the weights to bfloat16 first, for both: checkpoints are published so, and
the weights of smollm2-135m-instruct here come from four bits, which bfloat16 and float16 cannot hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ENGINES = ("afina", "transformers")
Rows = list[tuple[list[int], int]]  # prompts, and how many tokens are wanted behind each
turn_ends: list[int] = []  # the tokens that end a turn, known once the tokenizer is loaded
Written = tuple[list[list[int]], float, float]  # tokens of each row, seconds to the first one, seconds in all


def rows_of(case: str, vocab: int) -> Rows:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, min(vocab, 4000), (count,), generator=draw).tolist()

    if case == "shared":
        system = [*ids(191), *turn_ends[:1]]
        return [([*system, *ids(12 + i)], 16) for i in range(16)]
    if case == "rows":
        return [(ids(8 + 8 * (7 * i % 16)), 8 + 88 * (5 * i % 16) // 15) for i in range(16)]
    return [(ids(32), 64)] if case == "decode" else [(ids(256), 1)]


def afina_engine(source: str) -> Callable[[Rows], Written]:
    import afina
    from afina.engine.batcher import Batcher
    from afina.engine.packed import release
    from afina.engine.sampling import Sampling

    model, tokenizer = afina.load_model(source, dtype="float32", device="cpu"), afina.load_tokenizer(source)
    release(model)
    batcher = Batcher(model, tokenizer, max_rows=16, cache_bytes=1 << 28)
    turn_ends.extend(tokenizer.eos_ids)
    vars(tokenizer)["eos_ids"] = []

    def write(rows: Rows) -> Written:
        began = time.perf_counter()
        running = [batcher.submit(ids, Sampling(max_new_tokens=count)) for ids, count in rows]
        while not batcher.idle:
            batcher.step()
        taken = time.perf_counter() - began
        batcher.forget()  # no prompt is remembered from the round before
        return [row.new for row in running], (running[0].first_token or began) - began, taken

    return write


def transformers_engine(source: str) -> Callable[[Rows], Written]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.tokenizer = AutoTokenizer.from_pretrained(source)  # both hold one, as whoever generates text does

    class First(BaseStreamer):  # type: ignore[misc, no-any-unimported]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())  # the prompt first, then each token

        def end(self) -> None: ...

    @torch.inference_mode()
    def write(rows: Rows) -> Written:
        longest, most = max(len(ids) for ids, _ in rows), max(count for _, count in rows)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows])
        first = First() if len(rows) == 1 else None
        began = time.perf_counter()
        out = model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=0, streamer=first
        )
        taken = time.perf_counter() - began
        written = [row[longest : longest + count].tolist() for row, (_, count) in zip(out, rows, strict=True)]
        return written, (first.times[1] if first else began) - began, taken

    return write


def figure(case: str, rows: Rows, written: Written) -> float:
    """Tokens/s, seconds or rows/s."""
    _, first, taken = written
    if case == "first":
        return first
    return len(rows) / taken if case in ("rows", "shared") else (rows[0][1] - 1) / (taken - first)


def memory(engine: str, source: str) -> None:
    """Print how many bytes this process takes at most for the model and 16 rows."""
    before = _status("VmRSS")
    make = afina_engine if engine == "afina" else transformers_engine
    if engine == "transformers":
        import transformers  # noqa: F401 (what is imported is not what generation takes)
    else:
        import afina.engine.batcher
        import afina.engine.weights  # noqa: F401

    before = max(before, _status("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from what there is now
    write = make(source)
    gc.collect()
    config = json.loads((Path(source) / "config.json").read_text())
    write(rows_of("rows", config["vocab_size"]))
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def compare(name: str, source: str, rounds: int, cases: list[str]) -> list[dict[str, Any]]:
    config = json.loads((Path(source) / "config.json").read_text())
    engines = {"afina": afina_engine(source), "transformers": transformers_engine(source)}
    found = []
    for case in cases:
        rows = rows_of(case, config["vocab_size"])
        values: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        texts: dict[str, list[list[int]]] = {}
        for turn in range(rounds + 1):
            for engine, write in engines.items():
                written = write(rows)
                texts[engine] = written[0]
                if turn:  # the first round warms up
                    values[engine].append(figure(case, rows, written))
        ratios = [a / b for a, b in zip(values["afina"], values["transformers"], strict=True)]
        found.append(
            {
                "model": name,
                "case": case,
                "unit": {"decode": "tokens/s", "first": "s to the first token"}.get(case, "rows/s"),
                **{engine: round(statistics.median(numbers), 4) for engine, numbers in values.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
                "equal_texts": sum(a == b for a, b in zip(texts["afina"], texts["transformers"], strict=True)),
                "texts": len(rows),
            }
        )
    return found


def peaks_of(name: str, source: str) -> dict[str, Any]:
    peaks = {}
    for engine in ENGINES:
        command = [sys.executable, __file__, "--memory", engine, "--models", source]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[engine] = int(done.stdout.split()[-1])
    mb = {engine: round(peak / 1e6, 1) for engine, peak in peaks.items()}
    return {"model": name, "case": "memory", "unit": "MB, with the weights", **mb} | {
        "ratio": round(mb["afina"] / mb["transformers"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["afina-tiny", "smollm2-135m-instruct"])
    parser.add_argument("--cases", nargs="+", default=["decode", "first", "rows", "shared", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounded", action="store_true", help="weights rounded to bfloat16, for both")
    parser.add_argument("--memory", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        memory(args.memory, args.models[0])
        return
    import afina

    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:  # the same float32 weights for both
            model = afina.load_model(name, dtype="float32", device="cpu")
            if args.rounded:
                for parameter in model.parameters():
                    parameter.data = parameter.data.bfloat16().float()
            afina.save_model(model, afina.load_tokenizer(name), folder)
            del model
            timed = [case for case in args.cases if case != "memory"]
            rows = compare(name, folder, args.rounds, timed) if timed else []
            if "memory" in args.cases:
                rows.append(peaks_of(name, folder))
        for row in rows:
            tail = {
                "command": " ".join(["python", "benchmarks/bench_generate.py", *sys.argv[1:]]),
                "threads": args.threads,
                "load_average": round(os.getloadavg()[0], 1),
                "machine": platform.machine(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "versions": {package: version(package) for package in ("afina", "torch", "transformers")},
            }
            print(json.dumps(row | tail), flush=True)


if __name__ == "__main__":
    main()
