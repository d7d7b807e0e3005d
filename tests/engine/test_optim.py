"""engine/optim.py: decay on matrices only, equality with torch, clipping, bf16 weights that still learn, state, and
what each variant holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.optim import VARIANTS, AdamW, bytes_held, bytes_per_parameter
from afina.errors import ConfigError
from afina.kernels.blockwise import State8, dynamic_code
from afina.kernels.cases import allowed_error

EPS = torch.finfo(torch.float32).eps
HELD = [(variant, dtype) for variant in VARIANTS for dtype in (torch.float32, torch.bfloat16)]
HELD.remove(("adamw_bf16", torch.float32))  # It is refused.


def small_model(**changes: object) -> GPT:
    hf = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    } | changes  # fmt: skip
    return GPT(ModelConfig.from_hf(hf))


def set_gradients(optimizer: AdamW, step: int) -> None:
    """Draw gradients that depend on the step alone."""
    for i, p in enumerate(optimizer.params.values()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(p.dtype)


def test_zero_gradients_shrink_matrices_by_lr_times_decay_and_nothing_else() -> None:
    model = small_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamW(model, decay=model.decay_parameters(), weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.5)
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and name != "embed.weight"
        expected = before[name] * (1 - 0.5 * 0.1) if matrix else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=2 * EPS, atol=0)  # The product is rounded once by each.
    assert any(p.dim() == 1 for p in model.parameters())


def test_equals_torch_adamw_over_twenty_steps() -> None:
    model = small_model()
    decay = model.decay_parameters()
    twins, optimizers = [], []
    for dtype in (torch.float32, torch.float64):
        twin = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in model.parameters()]
        named = [(t, name in decay) for t, (name, _) in zip(twin, model.named_parameters())]
        groups = [
            {"params": [t for t, decays in named if decays == on], "weight_decay": wd}
            for on, wd in ((True, 0.1), (False, 0.0))
        ]
        twins.append(twin)
        optimizers.append(torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8))
    ours = AdamW(model, decay=decay, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(20):
        set_gradients(ours, step)
        for twin in twins:
            for p, t in zip(model.parameters(), twin):
                t.grad = p.grad.to(t.dtype, copy=True)  # type: ignore[union-attr]
        norm = ours.clip_(1.0)
        _, exact = (float(torch.nn.utils.clip_grad_norm_(twin, 1.0)) for twin in twins)
        # The n squares are positive, so a sum in any order is off by n / 2 eps at most, and its root by half of that.
        count = sum(p.numel() for p in model.parameters())
        assert norm == pytest.approx(exact, rel=count / 4 * EPS + 2 * EPS)
        ours.step(1e-2)
        for optimizer in optimizers:
            optimizer.step()
    for tensors in zip(model.parameters(), *twins):
        got, plain, want = (x.detach() for x in tensors)
        assert (got.double() - want).abs().max() <= allowed_error(plain, want, torch.float32)


def test_tied_embedding_is_held_once() -> None:
    assert "head.weight" not in AdamW(small_model(), decay=set()).params
    assert "head.weight" in AdamW(small_model(tie_word_embeddings=False), decay=set()).params


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_weights_move_under_updates_smaller_than_their_rounding(variant: str) -> None:
    """1,000 updates of -1e-3 take 1.0 to 0: AdamW turns a constant gradient into steps of the learning rate."""
    model = small_model().to(torch.bfloat16)
    weight = model.embed.weight
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = AdamW(model, decay=set(), weight_decay=0.0, variant=variant)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step(lr=1e-3)
    assert weight.dtype == torch.bfloat16
    if variant != "adamw_bf16":
        # The moments of 8 bits are the absmax of their block, so every number is off by the roundings of fp32 alone.
        # Each of 1,000 sums rounds a weight by half an eps, and the step by as much, through v, which remembers them
        # all.
        assert weight.abs().max() <= 1000 * EPS
        return
    # A stochastic rounding has a deviation of half a place at most: 2^-9 for a weight below 1. For the moments that is
    # relative, and m remembers 1 / (1 - b1^2) of those of its updates, v at most all.
    weights, m, v = 1000**0.5 * 2**-9, 2**-8 * (1 - 0.9**2) ** -0.5, 2**-8 * 1000**0.5 / 2
    deviation = (weights**2 + m**2 + v**2) ** 0.5
    assert weight.double().mean().abs() <= 5 * deviation / weight.numel() ** 0.5
    assert weight.double().std() <= 2 * deviation


@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_what_each_variant_holds(variant: str, dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    optimizer = AdamW(model, decay=set(), variant=variant)
    fp32 = variant != "adamw_bf16"
    for name, p in model.named_parameters():
        master, moments = optimizer.masters[name], (optimizer.exp_avgs[name], optimizer.exp_avg_sqs[name])
        assert master.dtype == (torch.float32 if fp32 else torch.bfloat16)
        assert (master.data_ptr() == p.data_ptr()) == (dtype == torch.float32 or not fp32)
        for moment, signed in zip(moments, (True, False)):
            if variant == "adamw_8bit":
                assert isinstance(moment, State8)
                assert moment.fits(p, signed)
            else:
                assert isinstance(moment, torch.Tensor)
                assert moment.dtype == master.dtype
    held = {x.data_ptr(): x.nbytes for group in optimizer.state().values() for x in group.values()}
    for p in model.parameters():
        held.pop(p.data_ptr(), None)
    predicted = sum(bytes_held(variant, p.dtype, p.numel()) for p in model.parameters())
    assert optimizer.nbytes == sum(held.values()) == predicted


def test_bytes_of_a_parameter() -> None:
    found = {v: bytes_per_parameter(v, torch.bfloat16) for v in VARIANTS}
    assert found == {"adamw": 12, "adamw_8bit": 4 + 2 * (1 + 4 / 256), "adamw_bf16": 4}
    assert bytes_per_parameter("adamw", torch.float32) == 8
    assert bytes_held("adamw_8bit", torch.float32, 257) == 2 * (257 + 2 * 4)


def test_variants_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optim: expected one of adamw, adamw_8bit, adamw_bf16, found 'adam'$"):
        AdamW(small_model(), decay=set(), variant="adam")
    told = r"^optim: adamw_bf16 rounds bfloat16 weights .*, but {} is float32; train in bfloat16, or choose .*$"
    with pytest.raises(ConfigError, match=told.format(r"embed\.weight")):
        AdamW(small_model(), decay=set(), variant="adamw_bf16")
    with pytest.raises(ConfigError, match=told.format("the model")):
        bytes_held("adamw_bf16", torch.float32, 1)


def test_8bit_follows_fp32() -> None:
    """The moments stay within what the roundings of their codes can add up to, and so do the weights on average."""
    plain, eight = (AdamW(small_model(), decay=set(), variant=variant) for variant in ("adamw", "adamw_8bit"))
    start = {n: w.clone() for n, w in plain.masters.items()}
    for n, w in eight.masters.items():
        w.copy_(start[n])
    gaps = {signed: float(dynamic_code(signed, torch.device("cpu")).diff().max()) / 2 for signed in (True, False)}
    bounds = {key: dict.fromkeys(start, 0.0) for key in gaps}
    for step in range(20):
        for optimizer in (plain, eight):
            set_gradients(optimizer, step)
            optimizer.step(1e-2)
        for signed, beta, ours, theirs in (
            (True, 0.9, eight.exp_avgs, plain.exp_avgs),
            (False, 0.999, eight.exp_avg_sqs, plain.exp_avg_sqs),
        ):
            for n, moment in ours.items():
                assert isinstance(moment, State8)
                # A code is off by half the widest gap at most, or by a whole one where it is kept off 0.
                largest = float(moment.absmax.max())
                bounds[signed][n] = beta * bounds[signed][n] + (gaps[signed] + 8 * EPS) * largest
                assert (moment.dequantize() - theirs[n]).abs().max() <= bounds[signed][n]  # type: ignore[operator]
    # A value above a tenth of its absmax has a relative error of ten such gaps; that of sqrt(v) is half of v's.
    relative = 10 * (gaps[True] + gaps[False] / 2)
    error = torch.cat([(eight.masters[n] - plain.masters[n]).abs().view(-1) for n in start]).mean()
    moved = torch.cat([(plain.masters[n] - start[n]).abs().view(-1) for n in start]).mean()
    assert 0 < error <= relative * moved


@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_state_comes_back_bit_for_bit_and_foreign_state_is_refused(variant: str, dtype: torch.dtype) -> None:
    def made(seed: int = 5, **changes: object) -> AdamW:
        torch.manual_seed(0)
        return AdamW(small_model(**changes).to(dtype), decay=set(), variant=variant, seed=seed)

    def run(optimizer: AdamW, steps: range) -> None:
        for i in steps:
            set_gradients(optimizer, i)
            optimizer.step(1e-2)

    straight = made()
    run(straight, range(6))
    first = made()
    run(first, range(3))
    saved = {group: {n: t.clone() for n, t in members.items()} for group, members in first.state().items()}
    second = made()
    run(second, range(7, 9))
    second.load_state(saved, first.num_updates)
    run(second, range(3, 6))
    assert second.num_updates == 6
    for group, members in straight.state().items():
        for name, tensor in members.items():
            assert torch.equal(tensor, second.state()[group][name])
    for name, p in straight.params.items():
        assert torch.equal(p, second.params[name])
    with pytest.raises(ValueError, match="another model"):
        made(hidden_size=32).load_state(saved, 3)
    if variant == "adamw_bf16":
        other = made(seed=6)
        run(other, range(6))
        assert not all(torch.equal(p, straight.params[name]) for name, p in other.params.items())
    for wrong in set(VARIANTS) - {variant, "adamw_bf16"}:
        with pytest.raises(ValueError, match=f"is not of {wrong}: resume with the optim it is of"):
            AdamW(small_model().to(dtype), decay=set(), variant=wrong).load_state(saved, 3)


def test_groups_do_not_repeat_each_others_roundings() -> None:
    """Two equal weights that take equal updates in groups of their own are rounded differently."""
    names = [f"layers.{i}.attn.o.weight" for i in range(2)]
    model = small_model().to(torch.bfloat16)
    optimizer = AdamW(model, decay={names[0]}, weight_decay=1e-30, variant="adamw_bf16")
    weights = [optimizer.params[name] for name in names]
    for weight in weights:
        weight.data.fill_(1.0)
        weight.grad = torch.ones_like(weight)
    optimizer.step(1e-3)
    assert len(optimizer.groups) == 2
    assert all(len(weight.unique()) == 2 for weight in weights)
    assert not torch.equal(*weights)
