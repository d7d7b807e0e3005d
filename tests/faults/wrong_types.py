"""Files whose values are of the wrong type, one at a time and at random places: what is used before it is checked.

A case is refused in one line or accepted; it never ends in an error of Python's own.
"""

# ruff: noqa: SIM905 (a text of names is easier to read than a list of them)

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from afina.engine.model_config import ModelConfig
from afina.engine.run_folder import FORMAT
from afina.engine.train_config import TrainConfig
from afina.errors import AfinaError
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe
from afina.loaders.weights.peft import AdapterFile
from afina.loaders.weights.safetensors import SafetensorsFolder
from afina.report.card import model_card
from afina.report.facts import read_run
from afina.report.measure import Measured
from afina.report.page import report_page
from afina.report.sections import training
from afina.report.verdict import judge

MAX_MESSAGE = 2000  # characters
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**70, 0.5, -1.5, 1e308, "", "x", "\x1b]0;x\x07", "9" * 5000, "a" * 100_000),
    *([], [[]], [None], [1], ["x"], [{}], [[1, 2]] * 3, {}, {"a": 1}, {"a": {}}, {"": None}, {"9" * 5000: {}}),
)
TAGS = (
    "int",
    "float",
    "bool",
    "timestamp",
    "null",
    "binary",
    "set",
    "omap",
    "pairs",
    "seq",
    "map",
    "merge",
    "x",
    "str",
)
YAML = (
    "''",
    "x",
    "0x",
    "1:",
    "2024-99-99",
    "[]",
    "{}",
    "[a, [b]]",
    "{a: {b: c}}",
    "*a",
    "&a [*a]",
    ".inf",
    "~",
    "-",
    "_",
)
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "llama3"}},
    {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
    {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "layer_types": ["full_attention"]},
    {"model_type": "gemma3_text", "sliding_window_pattern": 6, "rope_local_base_freq": 1e4},
    *({"model_type": kind} for kind in ("gemma2", "gpt2", "gpt_neox", "mistral", "olmo2", "qwen3", "smollm3")),
)
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 8}
SIZES["max_position_embeddings"] = 64
GPT2_SIZES = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 9}
KEYS = (
    "architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size intermediate_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
    "layer_types sliding_window use_sliding_window max_window_layers hidden_act tie_word_embeddings "
    "attention_bias mlp_bias no_rope_layers no_rope_layer_interval query_pre_attn_scalar attn_logit_softcapping "
    "final_logit_softcapping "
    "n_embd n_head n_layer n_positions n_inner rotary_pct rotary_emb_base layer_norm_eps use_parallel_residual "
    "quantization_config auto_map pruned_heads partial_rotary_factor original_max_position_embeddings "
    "sliding_window_pattern rope_local_base_freq activation_function scale_attn_weights text_config torch_dtype"
).split()
ROPE = (
    "rope_type type factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate low_freq_factor high_freq_factor short_factor long_factor rope_theta partial_rotary_factor attn_factor"
).split()
ADAPTER = (
    "peft_type bias r lora_alpha lora_dropout base_model_name_or_path target_modules modules_to_save use_rslora "
    "use_dora rank_pattern alpha_pattern fan_in_fan_out init_lora_weights layers_to_transform unknown task_type"
).split()
TOKENIZER = (
    "added_tokens_decoder chat_template bos_token eos_token unk_token pad_token additional_special_tokens "
    "extra_special_tokens add_bos_token tokenizer_class clean_up_tokenization_spaces"
).split()


def varied(start: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one place in it changed, left out or doubled."""
    value = copy.deepcopy(start)
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        item = left.pop()
        keys: Any = (
            item.keys() if isinstance(item, dict) else range(min(len(item), 8)) if isinstance(item, list) else ()
        )
        for key in list(keys):
            places.append((item, key))
            left.append(item[key])
    parent, key = draw.choice(places)
    if isinstance(parent, dict) and draw.random() < 0.1:
        del parent[key]
    else:
        parent[key] = draw.choice(VALUES)
    return value


def recipes(draw: random.Random) -> Callable[[], object]:
    name = draw.choice([*TrainConfig.__dataclass_fields__, "lr", "x"])
    kind = draw.randrange(3)
    text = f"!!{draw.choice(TAGS)} {draw.choice(YAML)}" if kind else json.dumps(draw.choice(VALUES))
    line = f"{name}: {text}\n" if kind < 2 else f"? {text}\n: 1\n"

    def read() -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text("model: afina-tiny\ndata: x.jsonl\noutput_dir: out\n" * draw.randrange(2) + line)
            TrainConfig.resolve(path)

    return read


def configs(draw: random.Random) -> Callable[[], object]:
    hf = draw.choice(CONFIGS)
    hf = hf | (GPT2_SIZES if hf["model_type"] == "gpt2" else SIZES)
    if draw.random() < 0.5:
        hf[draw.choice(KEYS)] = draw.choice(VALUES)
    if draw.random() < 0.5:
        rope: dict[str, Any] = {"rope_type": draw.choice(["yarn", "llama3", "longrope", "linear"]), "factor": 2.0}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope["rope_type"] == "llama3" else {}
        rope |= {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2} if rope["rope_type"] == "longrope" else {}
        hf["rope_scaling"] = rope | {draw.choice(ROPE): draw.choice(VALUES), draw.choice(ROPE): draw.choice(VALUES)}
    if draw.random() < 0.5:
        hf = varied(hf, draw)

    def read() -> None:
        config = ModelConfig.from_hf(hf)
        if config.num_layers < 100:
            config.tensors(hf)
            config.num_parameters()

    return read


def tokenizers(draw: random.Random) -> Callable[[], object]:
    files = _tokenizer_files()
    config = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    config["added_tokens_decoder"] = {"0": {"content": "</s>", "special": True}}  # type: ignore[assignment]
    changed: dict[str, Any] = {"tokenizer_config.json": config | {draw.choice(TOKENIZER): draw.choice(VALUES)}}
    name = draw.choice(
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "added_tokens.json"]
    )
    start = json.loads(files["tokenizer.json"]) if name == "tokenizer.json" else config | {"eos_token_id": [0]}
    changed[name] = varied(start, draw)

    def read() -> None:
        tokenizer = Tokenizer(files | {k: json.dumps(v).encode() for k, v in changed.items()}, "folder")
        tokenizer.decode(tokenizer.encode("a b"))
        assert tokenizer.eos_ids is not None
        tokenizer.render([{"role": "user", "content": "x"}])

    return read


def _tokenizer_files(made: dict[str, bytes] = {}) -> dict[str, bytes]:  # noqa: B006 (made once)
    if not made:
        made |= {"tokenizer.json": train_bpe(["a b a b"] * 4, 262, ["</s>"], "</s>").files()["tokenizer.json"]}
    return made


def adapters(draw: random.Random) -> Callable[[], object]:
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config = varied(config | {draw.choice(ADAPTER): draw.choice(VALUES)}, draw)
    dtype, width = draw.choice([("F32", 4), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("BOOL", 1), ("BF16", 2)])

    def read() -> None:
        with TemporaryDirectory() as name:
            Path(name, "adapter_config.json").write_text(json.dumps(config))
            names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
            header = {
                n: {"dtype": dtype, "shape": [2, 2], "data_offsets": [4 * width * i, 4 * width * (i + 1)]}
                for i, n in enumerate(names)
            }
            text = json.dumps(header).encode()
            Path(name, "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8 * width))
            file = AdapterFile(Path(name))
            for module, parts in file.lora.items():
                file.config.scale(module)
                for part in parts.values():
                    file.read(part)

    return read


def indexes(draw: random.Random) -> Callable[[], object]:
    shard = draw.choice(
        ["a" * 300 + ".safetensors", "\x00.safetensors", "..safetensors", "a\udc80.safetensors", "é" * 130]
    )
    index = varied({"weight_map": {"a": shard, "b": "b.safetensors"}, "metadata": {}}, draw)

    def read() -> None:
        with TemporaryDirectory() as name:
            Path(name, "model.safetensors.index.json").write_text(json.dumps(index))
            SafetensorsFolder(Path(name))

    return read


def runs(draw: random.Random) -> Callable[[], object]:
    """A run folder that somebody else wrote: its report's page and its model card."""
    versions = {"versions": {"torch": "2.13"}, "platform": "x", "time": "now"}
    files: dict[str, Any] = {
        "run.json": {
            "format": FORMAT,
            "config": TrainConfig(model="afina-tiny", data="x.jsonl", output_dir="out", learning_rate=1e-3).to_dict(),
            "facts": {"data_sha256": "a", "parameters": 1},
            "started": versions,
            "resumed": [{"step": 1, "lowered": {"learning_rate": [0.1, 0.01]}, **versions}],
            "data": {"rows": 3, "schema": "messages", "train_lengths": {"p50": 1, "p95": 2, "max": 3}, "data": "x"},
            "total_steps": 2,
            "finished": {"steps": 2, "peak_memory_gb": 1.0, "dev_loss": 1.0, "stopped_early": False},
        },
        "metrics.jsonl": [
            {"step": 0, "dev_loss": 3.0, "best": False},
            {"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5, "tokens": 9, "trained_tokens": 5},
            {"step": 1, "dev_loss": 2.0, "best": True},
        ],
        "dev_rows.json": {
            "step": 1,
            "metric": draw.choice([None, {"name": "bleu", "before": [[9.0] * 10] * 2, "after": [[8.0] * 10] * 2}]),
            "rows": [{"where": "x: line 1", "tokens": 3, "loss_before": 3.0, "loss": 2.0}] * 2,
        },
        "best/manifest.json": {"files": {}, "step": 1, "dev_loss": 2.0},
    }
    for name in draw.sample([*files, "run.json"], 2):
        files[name] = varied(files[name], draw)

    def read() -> None:
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "best").mkdir()
            for file, content in files.items():
                lines = "\n".join(map(json.dumps, content)) if file.endswith("l") and isinstance(content, list) else ""
                (folder / file).write_text(lines or json.dumps(content))
            about: dict[str, Any] = {"base": None, "base_folder": folder, "modelfile": None, "check": {}}
            model_card(folder / "best", name="m", format="hf", files=["model.safetensors"], **about)
            facts = read_run(folder)
            report_page(facts, judge(facts.dev_rows), Measured(), training(facts))

    return read


KINDS: dict[str, Callable[[random.Random], Callable[[], object]]] = {
    "recipes": recipes,
    "configs": configs,
    "tokenizers": tokenizers,
    "adapters": adapters,
    "indexes": indexes,
    "runs": runs,
}


SLOW = {"runs": 20}  # kinds that draw pages take so many times as long, so as many fewer are tried


class FellError(Exception):
    """How many cases of a batch ended in an error of Python's own, and the first of them."""


def batches(kind: str, seed: int, rounds: int, size: int = 100) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Random cases of a kind in batches: name, function that runs them and raises FellError, number of cases."""
    if kind in SLOW:
        rounds, size = rounds // SLOW[kind], max(1, size // SLOW[kind])
    for first in range(0, rounds, size):
        numbers = range(first, min(first + size, rounds))
        yield f"{kind} {first}", partial(_run, kind, seed, numbers), len(numbers)


def _run(kind: str, seed: int, numbers: range) -> None:
    fell = []
    for number in numbers:
        case = KINDS[kind](random.Random(f"{kind} {seed} {number}"))
        try:
            case()
        except AfinaError as problem:
            if "\n" in str(problem) or len(str(problem)) > MAX_MESSAGE:
                fell.append(f"case {number}: a message of {len(str(problem)):,} characters: {str(problem)[:80]!r}")
        except Exception as problem:
            fell.append(f"case {number}: {type(problem).__name__}: {str(problem)[:200]}")
    if fell:
        raise FellError(f"{len(fell)} of {len(numbers)}: {fell[0]}")
