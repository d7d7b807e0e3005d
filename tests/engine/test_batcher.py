"""Rows join and leave in any company, and the numbers of each are those that it has alone, bit for bit."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fake_graph import FakeGraph
from fake_graph import fake_graphs as fake_graphs
from hf_models import parametrize, saved
from tiny_model import adapted, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afina.engine import decode_step, kv_pool, layouts, packed, row_exact
from afina.engine.batcher import Batcher
from afina.engine.decode_step import DecodeStep
from afina.engine.guesses import LEAST, Guesses
from afina.engine.kv_pool import KVPool
from afina.engine.linear import Linear
from afina.engine.model import GPT
from afina.engine.model_config import RopeConfig
from afina.engine.packed import HalfEmbedding, HeadEmbedding, PackedModel, release
from afina.engine.rope_tables import RopeTables
from afina.engine.row import Row
from afina.engine.row_exact import padded
from afina.engine.sampling import Sampling
from afina.engine.text_stream import WINDOW, TextStream
from afina.engine.weights import load_model
from afina.errors import ConfigError, DataError
from afina.loaders.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny_model(tokenizer)


class Watched(Batcher):
    """Keeps the logits from which each row's tokens were chosen."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[Row, list[Tensor]] = {}

    def _append(self, row: Row, token: int, logits: Tensor) -> None:
        self.seen.setdefault(row, []).append(logits[0].clone())
        super()._append(row, token, logits)


def run(batcher: Batcher) -> None:
    while not batcher.idle:
        batcher.step()


def prompts_of(count: int, vocab: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, vocab, (n,), generator=draw).tolist() for n in lengths]


def sampling_of(number: int) -> Sampling:
    """Settings that differ from row to row."""
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 1.2, "top_p": 0.9, "seed": number},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "frequency_penalty": 0.7, "logit_bias": {3: 2.0}},
    ]
    return Sampling(max_new_tokens=5 + 3 * (number % 5), **choices[number % 4])


@parametrize("llama", "gemma2", "gpt2", "phi3-longrope", "qwen3")
def test_a_row_alone_and_in_company(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows beside it come and go, are prefilled in chunks and cancelled, and begin as it does."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    model = load_model(saved(name).folder)
    prompts = prompts_of(9, 61, longest=30)
    prompts[3] = prompts[0][:8] + prompts[3]
    prompts[4] = list(prompts[0])
    alone = []
    for number, prompt in enumerate(prompts):
        batcher = Watched(model, tokenizer, max_rows=5, prefill_chunk=8, max_length=48)
        row = batcher.submit(prompt, sampling_of(number))
        run(batcher)
        alone.append((row, batcher.seen[row]))
    batcher = Watched(model, tokenizer, max_rows=5, prefill_chunk=8, max_length=48)
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append(batcher.submit(prompt, sampling_of(number)))
        extra = batcher.submit(prompt[::-1], Sampling(max_new_tokens=9))
        for step in range(2):
            batcher.step()
            if step and number % 2:
                batcher.cancel(extra)
    run(batcher)
    assert any(row.cached_tokens for row in rows)
    for row, (lonely, logits) in zip(rows, alone, strict=True):
        assert row.new == lonely.new
        assert row.finish_reason == "length"
        assert len(batcher.seen[row]) == len(logits)
        assert all(torch.equal(a, b) for a, b in zip(batcher.seen[row], logits))


@parametrize("llama", "gemma2", "phi3-longrope")
def test_logits_are_those_of_a_plain_forward_pass(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the window, and past LongRoPE's original maximum (32), where all of a row is computed again."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    model = load_model(saved(name).folder)
    batcher = Watched(model, tokenizer, prefill_chunk=7, max_length=48)
    rows = [batcher.submit(ids, Sampling(max_new_tokens=20)) for ids in prompts_of(4, 61, longest=32, seed=2)]
    rows.append(batcher.submit(list(range(40)), Sampling(max_new_tokens=8)))
    run(batcher)
    for row in rows:
        for count, logits in enumerate(batcher.seen[row]):
            with torch.no_grad():
                expected = model(torch.tensor([row.prompt + row.new[:count]]))[0, -1]
            torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-4)


def greedy(**options: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 6, **options})


def test_what_cannot_be_run_is_refused(model: GPT, tokenizer: Tokenizer) -> None:
    batcher = Batcher(model, tokenizer, max_length=20)
    with pytest.raises(DataError, match="empty"):
        batcher.submit([], greedy())
    with pytest.raises(DataError, match="has 20 tokens and a row holds 20 at most"):
        batcher.submit([1] * 20, greedy())
    with pytest.raises(DataError, match="token 320 does not exist: the model knows those from 0 to 319"):
        batcher.submit([320], greedy())
    with pytest.raises(DataError, match="token 999 does not exist"):
        batcher.submit([1], greedy(logit_bias={999: 1.0}))
    with pytest.raises(ConfigError, match="max_rows is 0"):
        Batcher(model, tokenizer, max_rows=0)
    with pytest.raises(ConfigError, match="cache_bytes is 100; expected 768 or more: a token of this model takes 256"):
        Batcher(model, tokenizer, cache_bytes=100)
    assert batcher.idle


def test_the_cache_keeps_its_bound(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wait for room, in their order; what is left of others makes room; none is longer than the cache."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    batcher = Batcher(model, tokenizer, cache_bytes=50 * 256)
    assert batcher.cache_bytes == 50 * 256
    assert batcher.max_length == 49
    rows = [batcher.submit([i + 1] * 14, greedy()) for i in range(6)]
    most = 0
    while not batcher.idle:
        batcher.step()
        most = max(most, batcher.running)
        assert batcher.cache_bytes == batcher.pool.memory.nbytes == 50 * 256
        assert all(a.stop <= b.start for a, b in zip(batcher.pool.spans, batcher.pool.spans[1:]))
    assert most == 2  # of 20 tokens each
    began = [row.first_token or 0.0 for row in rows]
    assert all(row.finish_reason == "length" for row in rows)
    assert began == sorted(began)
    big = batcher.submit([3] * 43, greedy())
    run(batcher)
    assert len(big.new) == 6


def test_a_cancelled_row_frees_its_place(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    batcher = Batcher(model, tokenizer, max_rows=2)
    first, second, third, fourth = (batcher.submit([i + 1, 2], greedy(max_new_tokens=30)) for i in range(4))
    batcher.step()
    assert (batcher.running, batcher.waiting) == (2, 2)
    batcher.cancel(first)
    batcher.cancel(fourth)
    changed = batcher.step()
    assert first in changed
    assert fourth in changed
    assert first.finish_reason == fourth.finish_reason == "cancelled"
    assert len(first.new) == 1
    assert (batcher.running, batcher.waiting) == (2, 0)
    run(batcher)
    assert len(second.new) == len(third.new) == 30
    batcher.cancel(second)  # too late
    batcher.step()
    assert second.finish_reason == "length"


def test_an_error_in_one_row_stops_no_other(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    batcher = Batcher(model, tokenizer)
    good, early, late = (batcher.submit([i + 1, 2], greedy()) for i in range(3))
    hidden, choose = GPT.hidden, Row.choose

    def failing(self: GPT, ids: Tensor, **options: Any) -> Tensor:
        if ids.shape[1] == 2 and ids[0, 0] == 2:
            raise RuntimeError("no memory")
        return hidden(self, ids, **options)

    def refusing(self: Row, logits: Tensor) -> int:
        if self is late and len(self.new) == 3:
            raise ValueError("no such token")
        return choose(self, logits)

    monkeypatch.setattr(GPT, "hidden", failing)
    monkeypatch.setattr(Row, "choose", refusing)
    late.sampling = Sampling(max_new_tokens=6, temperature=1.0)
    run(batcher)
    assert (early.finish_reason, str(early.error)) == ("error", "no memory")
    assert (late.finish_reason, str(late.error), len(late.new)) == ("error", "no such token", 3)
    assert (good.finish_reason, len(good.new)) == ("length", 6)
    assert batcher.idle


def test_shared_beginnings_are_computed_once(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the boundaries of chunks, from rows that run and from rows that are done; whole prompts too."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    system, computed = list(range(20)), []
    hidden = GPT.hidden

    def counting(self: GPT, ids: Tensor, **options: Any) -> Tensor:
        computed.append(ids.numel() if ids.shape[0] == 1 and ids.shape[1] > 1 else 0)
        return hidden(self, ids, **options)

    monkeypatch.setattr(GPT, "hidden", counting)
    batcher = Batcher(model, tokenizer, prefill_chunk=8)
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    rows = [batcher.submit([*system, 30, 31], sampling.nth(n)) for n in range(3)]
    run(batcher)
    rows.append(batcher.submit([*system, 40, 41, 42], sampling))
    rows.append(batcher.submit([7, *system[1:]], sampling))
    run(batcher)
    assert [row.cached_tokens for row in rows] == [0, 22, 22, 16, 0]
    assert sum(computed) == 22 + 7 + 20
    assert len({tuple(row.new) for row in rows[:3]}) == 3


def test_turns_are_shared(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system message and earlier turns of any length are computed once, and the numbers are those without that."""
    end = tokenizer.eos_ids[0]
    plain = [token for token in range(300) if token not in tokenizer.eos_ids]
    system, question, other = [*plain[:33], end], [*plain[50:82], end, *plain[:9]], [*plain[99:110], end, 7, 8]
    prompts = [system + question, system + other, system + question[:-9] + other]
    prompts.append([*system[:10], 200, *system[11:], *question])  # shares nothing behind the token that differs

    def fresh() -> Watched:
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "eos_ids", [end])
            return Watched(model, tokenizer)

    together = fresh()
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    rows = [together.submit(prompt, greedy()) for prompt in prompts]
    run(together)
    assert sum(row.cached_tokens for row in rows) == 34 + 34 + 33
    for prompt, row in zip(prompts, rows, strict=True):
        alone = fresh()
        lonely = alone.submit(prompt, greedy())
        run(alone)
        assert lonely.new == row.new
        assert all(torch.equal(a, b) for a, b in zip(alone.seen[lonely], together.seen[row], strict=True))


def test_where_prompts_are_cut(model: GPT, tokenizer: Tokenizer) -> None:
    """Behind turns of 32 tokens and more, where 8 tokens and more follow, and where a chunk is full."""
    prefill, end = Batcher(model, tokenizer, prefill_chunk=50).prefill, tokenizer.eos_ids[0]

    def cuts(*lengths: int) -> list[int]:
        """Of turns of these lengths, their ends included, but for the last, which has none."""
        ids = [token for n in lengths for token in [*[5] * (n - 1), end]]
        return [at for at, _ in prefill.boundaries([*ids[:-1], 5])]

    assert cuts(32, 8) == [32, 40]
    assert cuts(31, 20) == [50, 51]
    assert cuts(20, 20, 20) == [40, 60]
    assert cuts(32, 7) == [39]
    assert cuts(70, 40, 9) == [50, 100, 119]
    assert cuts(70, 14, 40) == [50, 84, 124]


def test_log_probabilities(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model's own distribution, whatever the sampling makes of it; of the prompt's tokens too."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    prompt = tokenizer.encode("the quick brown fox jumps over", add_special=False)
    sampling = Sampling(max_new_tokens=7, temperature=2.0, top_k=3, repetition_penalty=1.5, logprobs=4)
    batcher = Batcher(model, tokenizer, prefill_chunk=5)
    other = batcher.submit(prompt, Sampling(max_new_tokens=3))
    row = batcher.submit(prompt, sampling, echo_logprobs=True)
    run(batcher)
    assert other.logprobs == []
    assert row.cached_tokens == 0
    ids = prompt + row.new
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert row.prompt_logprobs is not None
    found = row.prompt_logprobs + row.logprobs
    assert [entry.token for entry in found] == ids
    assert found[0].logprob is None
    for at, entry in enumerate(found[1:]):
        assert entry.logprob == pytest.approx(float(expected[at, ids[at + 1]]), abs=1e-4)
        values, tokens = expected[at].topk(4)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    start = len(tokenizer.decode(prompt))
    before = [tokenizer.decode(prompt + row.new[:n], skip_special=True).rstrip("\ufffd") for n in range(7)]
    assert [entry.offset for entry in row.logprobs] == [len(text) - start for text in before]
    assert [e.offset for e in row.prompt_logprobs] == [len(tokenizer.decode(prompt[:n])) for n in range(len(prompt))]


def test_penalties_and_bias(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    prompt = [5, 6, 7]

    def tokens(**options: Any) -> list[int]:
        batcher = Batcher(model, tokenizer)
        row = batcher.submit(prompt, Sampling(max_new_tokens=12, **options))
        run(batcher)
        return row.new

    def plain(frequency: float, presence: float, bias: dict[int, float]) -> list[int]:
        new: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new]))[0, -1]
            for token, number in bias.items():
                logits[token] += number
            for token in set(new):
                logits[token] -= frequency * new.count(token) + presence
            new.append(int(logits.argmax()))
        return new

    free = tokens()
    assert free == plain(0, 0, {})
    for frequency, presence, bias in ((2.0, 0.0, {}), (0.0, 2.0, {}), (1.5, -0.5, {free[0]: -100.0, 9: 3.0})):
        found = tokens(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
        assert found == plain(frequency, presence, bias)
    assert free[0] not in tokens(logit_bias={free[0]: -100})
    assert tokens(logit_bias={9: 100}) == [9] * 12


WORKS = {"Half": layouts.half_works, "OneDNN": lambda: layouts.onednn_works(torch.float32)}


@pytest.mark.parametrize("layout", WORKS)
@pytest.mark.parametrize("options", [None, {}, {"dora": True}], ids=["plain", "lora", "dora"])
@torch.no_grad()
def test_packed_weights_compute_the_same(
    model: GPT, options: dict[str, Any] | None, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the plain ones, which come back after the step; and alone, when those are gone."""
    if not WORKS[layout]():
        pytest.skip("torch has no such layout here")
    monkeypatch.setattr(packed, "LEAST", 1)
    monkeypatch.setattr(packed, "LEAST_HALF", 1)
    model = copy.deepcopy(model).eval()
    if layout == "Half":
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    if options is not None:
        adapted(model, **options)
    ids = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    names = [name for name, _ in model.named_parameters()]
    with PackedModel(model):
        kinds = {type(m.packed and m.packed.weight).__name__ for m in model.modules() if isinstance(m, Linear)}
        assert kinds == {layout} == {type(model.packed_head).__name__}
        torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(model(ids), expected)
    dense = {name: m.dense(torch.float32) for name, m in model.named_modules() if isinstance(m, Linear)}
    plain = model.layers[0].mlp.down.nbytes
    release(model, keep={"layers.0.mlp.down.weight"})
    gone = set(names) - {name for name, _ in model.named_parameters()}
    assert "layers.1.mlp.down.weight" in gone
    # The embedding of its own goes where it is held in 16 bits, or can be read where the head lies.
    assert ("embed.weight" in gone) == (not isinstance(model.embed, torch.nn.Embedding))
    if layout == "Half":
        assert isinstance(model.embed, HalfEmbedding)
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert isinstance(model.embed, HeadEmbedding)
    assert model.dtype == torch.float32
    assert "layers.0.mlp.down.weight" not in gone
    for name, weight in dense.items():
        assert torch.equal(model.get_submodule(name).dense(torch.float32), weight)
    assert model.layers[0].mlp.down.nbytes == plain
    filled = 2 * 512 * model.config.hidden_size if layout == "Half" else plain
    assert model.layers[1].mlp.down.nbytes >= filled
    torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("exchanged", [(), ("embed.weight",), ("head.weight",)])
@torch.no_grad()
def test_what_embedding_and_head_leave_behind(
    tokenizer: Tokenizer, exchanged: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is packed alone, and an embedding that float16 holds lies in it, unless something exchanges either."""
    if not layouts.half_works():
        pytest.skip("torch has no such layout here")
    monkeypatch.setattr(packed, "LEAST_HALF", 1)
    model = tiny_model(tokenizer, tie_word_embeddings=False).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    model.embed.weight[5, 3] = 1e-9  # smaller than float16 holds, and too small to matter
    ids, before = torch.tensor([[5, 7, 5]]), model.embed.weight.clone()
    expected = model(ids)
    release(model, keep=exchanged)
    held = {name for name, _ in model.named_parameters()} & {"embed.weight", "head.weight"}
    assert held == ({"embed.weight", "head.weight"} if exchanged else set())
    assert (model.embed(ids) - before[ids]).abs().max() <= layouts.ROUNDING
    torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=1e-4)
    model = tiny_model(tokenizer, tie_word_embeddings=False).eval()
    model.embed.weight[0, 0] = 1e5  # larger than float16 holds
    release(model)
    assert model.embed.weight[0, 0] == 1e5
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.skipif(not layouts.onednn_works(torch.float32), reason="torch has no oneDNN here")
@torch.no_grad()
def test_steps_have_the_sizes_that_onednn_fills_up_to(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST", 1)
    monkeypatch.setattr(packed, "LEAST_HALF", 1 << 40)
    sizes = Batcher(tiny_model(tokenizer), tokenizer, max_rows=30).sizes
    assert sizes == (1, 2, 4, 8, 12, 16, 24, 32)
    monkeypatch.setattr(packed, "LEAST", 1 << 40)
    model = tiny_model(tokenizer)
    with PackedModel(model):
        assert not row_exact._uses_onednn(model)
        adapted(model)  # whose thin matrices oneDNN multiplies
        assert row_exact._uses_onednn(model)


def test_sizes_that_do_not_agree_are_left_out(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the place of a row matters in the largest batch, that is the next size; at last rows run one at a time."""
    module = row_exact

    def noisy(sizes: set[int]) -> Any:
        return lambda x: x * (1.0000001 if len(x) in sizes else 1.0)

    assert module._agreeing(noisy({1, 2, 3}), 5, [1, 2, 3, 4, 6, 8], torch.float32) == {4, 6, 8}
    assert module._agreeing(lambda x: x + torch.arange(len(x))[:, None, None], 5, [1, 4, 8], torch.float32) == set()

    def rarely(x: Tensor) -> Tensor:  # vector code, and other code for the last number of a batch of five
        y = x.clone()
        y[4:5, :, -1:] *= 1.0000001 if len(x) == 5 and float(x[4, 0, -1]) > 1 else 1.0
        return y

    assert module._agreeing(rarely, 5, [4, 5, 8], torch.float32) == {4, 8}
    for place_matters, expected in (({8}, (1, 2, 3, 4, 5, 6, 10)), (set(module.SIZES), (1,))):
        monkeypatch.setattr(
            module, "_agreeing", lambda f, w, sizes, d, p=place_matters: set() if sizes[-1] in p else set(sizes) - p
        )
        monkeypatch.setattr(module, "_measured", type(module._measured)())
        assert module.exact_sizes(model, 8) == expected
    assert [padded(n, (4, 6, 8)) for n in (1, 4, 5, 7, 9)] == [4, 4, 6, 8, 8]


class NoLook(TorchDispatchMode):
    """Fails where the host looks at a tensor's value, which a captured graph cannot do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), name
        return func(*args, **(kwargs or {}))


@parametrize("llama", "gemma2", "gpt2", "phi3-longrope", "qwen3")
@torch.no_grad()
def test_what_a_graph_captures_looks_at_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only attention's torch path looks at lengths, on a CPU; a kernel stands there on a GPU."""
    model = load_model(saved(name).folder)
    pool = KVPool(model.config, 64, torch.device("cpu"), torch.float32)
    pool.memory.normal_(generator=torch.Generator().manual_seed(0))
    step = DecodeStep(model, pool, 48)
    table = torch.tensor([[3, 4, 0, 0], [0, 20, 0, 0], [6, 40, 0, 0], [5, 59, 64, 64]])
    expected = step(table)
    calls: list[Tensor] = []
    monkeypatch.setattr(kv_pool, "decode_attention", lambda q, *_, **__: calls.append(q) or q)
    with NoLook():
        step.compute(table)
    assert len(calls) == model.config.num_layers
    monkeypatch.undo()
    assert torch.equal(step(table), expected)


@pytest.mark.usefixtures("fake_graphs")
@torch.no_grad()
def test_a_step_is_captured_once_for_each_size_or_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(saved("llama").folder)
    step = DecodeStep(model, KVPool(model.config, 64, torch.device("cpu"), torch.float32), 48)
    step.captures, step.lean = True, None
    monkeypatch.setattr(decode_step, "Shared", Mock())
    monkeypatch.setattr(decode_step, "CudaGraph", lambda shared: FakeGraph())
    monkeypatch.setattr(step, "compute", lambda table: 2 * table.sum(0, keepdim=True))
    for value in (1, 2):
        for size in (2, 3):
            table = torch.full((4, size), value)
            assert torch.equal(step(table), 8 * torch.full((1, size), value))
    assert [graph.replays for graph in FakeGraph.made] == [2, 2]
    monkeypatch.setattr(step, "compute", Mock(side_effect=[RuntimeError("not permitted"), table, table]))
    for _ in range(2):
        assert step(torch.ones(4, 5, dtype=torch.int64)) is table
    assert capsys.readouterr().err == "afina: decoding without CUDA graphs, since capturing one failed: not permitted\n"


@pytest.mark.gpu
def test_graphs_give_what_steps_give(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    model = tiny_model(tokenizer).cuda()
    prompts = prompts_of(7, 300, longest=20)
    found = []
    for captures in (True, False):
        batcher = Batcher(model, tokenizer, max_rows=8, cache_bytes=1 << 20)
        batcher.step_of.captures = captures
        rows = [batcher.submit(ids, Sampling(max_new_tokens=4 + i)) for i, ids in enumerate(prompts)]
        run(batcher)
        assert bool(batcher.step_of.captured) == captures
        found.append([row.new for row in rows])
    assert found[0] == found[1]


def test_long_texts_are_settled_on_the_way(tokenizer: Tokenizer) -> None:
    """What streams is what decoding all at once gives, though only the last tokens are decoded again."""
    draw = torch.Generator().manual_seed(5)
    ids = [token for token in torch.randint(5, 320, (400,), generator=draw).tolist() if token not in tokenizer.eos_ids]
    ids += tokenizer.encode(" Grüße 🙂 日本, naïve façade" * 6, add_special=False)
    prompt = tokenizer.encode("how do I", add_special=False)
    stream = TextStream(tokenizer, prompt)
    sent = ""
    for count, token in enumerate(ids, 1):
        stream.add(token)
        if count % 3 == 0:
            text = stream.text(final=False)
            assert text.startswith(sent)
            sent = text
    whole = tokenizer.decode(prompt + ids, skip_special=True)[len(tokenizer.decode(prompt)) :]
    assert stream.text(final=True) == whole.rstrip("\ufffd")
    assert len(stream.open) <= 2 * WINDOW


@pytest.mark.parametrize("name", ["llama", "phi3-longrope"])
def test_guesses_change_nothing_but_the_number_of_steps(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that repeats itself, greedy and drawn, past LongRoPE's limit, and cut by its length among guesses."""
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    model = load_model(saved(name).folder)
    prompts = [[5, 6, 7, 8] * 4, [9, 3] * 5, list(range(20))]
    found, steps = [], []
    for guessing in (True, False):
        if not guessing:
            monkeypatch.setattr(Batcher, "_guessed", lambda self, rows: [[] for _ in rows])
        batcher = Watched(model, tokenizer, max_length=60)
        choices: list[dict[str, Any]] = [{}, {"logit_bias": {4: 100.0}}, {"temperature": 0.7, "top_k": 2}]
        rows = [batcher.submit(ids, Sampling(max_new_tokens=26 + i, **choices[i])) for i, ids in enumerate(prompts)]
        count = 0
        while not batcher.idle:
            batcher.step()
            count += batcher.running
        found.append([(row.new, batcher.seen[row]) for row in rows])
        steps.append(count)
    for (new, logits), (plain, expected) in zip(*found, strict=True):
        assert new == plain
        assert len(logits) == len(expected) == len(new)
        assert all(torch.equal(a, b) for a, b in zip(logits, expected))
    assert steps[0] < steps[1]


def test_guesses_are_what_followed_last_time() -> None:
    guesses = Guesses([1, 2, 3, 4, 1, 2])
    assert guesses.next(3) == [3, 4, 1]
    assert guesses.next(7) == [3, 4, 1, 2, 3, 4, 1]  # the text repeats itself, and goes on
    guesses.add(9)
    assert guesses.next(3) == []
    for token in (1, 2):
        guesses.add(token)
    assert guesses.next(1) == [9]
    for _ in range(6):
        guesses.was(False)
    assert guesses.rate < LEAST


def test_the_angles_of_a_position_do_not_depend_on_the_others() -> None:
    """Vector code and what it leaves over may round a cosine differently, so they come from one table."""
    table = RopeTables(RopeConfig("default", 10000.0, 6))
    every = table.looked_up(torch.arange(700)[None], torch.zeros(1), 700)
    for at in (0, 5, 511, 512, 699):
        alone = RopeTables(table.rope).looked_up(torch.tensor([[at]]), torch.zeros(1), at + 1)
        for one, all_ in zip(alone, every, strict=True):
            assert torch.equal(one[0, 0], all_[0, at])
    angles = torch.arange(700)[:, None].float() * table.inv_freq(torch.device("cpu"))
    torch.testing.assert_close(every[0][0], angles.cos())
    torch.testing.assert_close(every[1][0], angles.sin())
