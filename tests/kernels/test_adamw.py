"""AdamW beside torch.optim.AdamW and the plain formulas."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE, DRAWN, assert_near, draw, strided
from torch import Tensor

from afina.kernels import launch
from afina.kernels.adamw import _plans, adamw_, adamw_reference_
from afina.kernels.adamw_torch import _stochastic
from afina.kernels.adamw_triton import _tables
from afina.kernels.blockwise import State8, dynamic_code
from afina.kernels.cases import allowed_error

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}


# float64 results differ by a few roundings of 1e-16, some of them divided by eps; the default of assert_near is 1e-10.


def assert_no_worse(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The rule of kernels/cases.py: `plain` is what torch gives in the dtypes of `got`, and `exact` is float64."""
    assert len(got) == len(plain) == len(exact)
    for i, (a, b, want) in enumerate(zip(got, plain, exact)):
        assert a.dtype == b.dtype, i
        if a.numel():
            error, allowed = float((a.double() - want).abs().max()), allowed_error(b, want, a.dtype)
            assert error <= allowed, f"tensor {i}: {error} > {allowed}"


def walk(
    update: Callable[..., None], params: list[Tensor], steps: int, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """The parameters and both moments after `steps` updates with drawn gradients of `dtype`."""
    params = [p.clone() for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(1, steps + 1):
        grads = [draw(*p.shape, seed=step, dtype=dtype) for p in params]
        update(params, grads, *moments, step=step, **(OPTIONS | options))
    return [*params, *moments[0], *moments[1]]


def test_twenty_steps_of_torch_optim() -> None:
    params = [draw(3, 5), draw(7), draw(1, 1), draw(0, 4)]
    own = [p.clone().requires_grad_() for p in params]
    oracle = torch.optim.AdamW(own, **OPTIONS, foreach=False, fused=False)
    for step in range(1, 21):
        for p in own:
            p.grad = draw(*p.shape, seed=step)
        oracle.step()
    got = walk(adamw_, params, 20, torch.float64)
    moments = [oracle.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in own]
    assert_near(got, [*(p.detach() for p in own), *moments])


@DRAWN
@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=2), max_size=3),
    beta1=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.5]),
    grad=st.sampled_from([torch.float64, torch.bfloat16, torch.float32]),
)
def test_against_reference(shapes: list[list[int]], beta1: float, decay: float, grad: torch.dtype) -> None:
    params = [draw(*shape, seed=9) for shape in shapes]
    got, want = (walk(f, params, 3, grad, betas=(beta1, 0.99), weight_decay=decay) for f in (adamw_, adamw_reference_))
    assert_near(got, want)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_fp32_and_repeats(grad: torch.dtype) -> None:
    params = [draw(33, 5, dtype=torch.float32), draw(3, dtype=torch.float32)]
    got, again = (walk(adamw_, params, 5, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    exact = walk(adamw_reference_, [p.double() for p in params], 5, grad)
    assert_no_worse(got, walk(adamw_reference_, params, 5, grad), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    params = [draw(64, dtype=dtype)]
    exact = walk(adamw_reference_, [params[0].double()], 3, dtype)
    assert_no_worse(walk(adamw_, params, 3, dtype), walk(adamw_reference_, params, 3, dtype), exact)


BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.mark.parametrize("layout", ["grad", "param", "broadcast", "all"])
@BACKENDS
def test_strides(layout: str, backend: str) -> None:
    """A transposed, strided or broadcast tensor is updated at its own places."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    values = [draw(4, 6, seed=seed, dtype=dtype).to(DEVICE) for seed in range(4)]
    values[3].square_()
    if layout == "broadcast":
        values[1] = draw(1, 1, dtype=dtype).to(DEVICE).expand(4, 6)
    plain, exact = ([x.to(wide, copy=True) for x in values] for wide in (dtype, torch.float64))
    for tensors in (plain, exact):
        adamw_reference_(*([x] for x in tensors), step=2, **OPTIONS)
    odd = {"grad": (1,), "param": (0,), "broadcast": (), "all": (0, 1, 2, 3)}[layout]
    got = [strided(x) if i in odd else x for i, x in enumerate(values)]
    adamw_(*([x] for x in got), step=2, backend=backend, **OPTIONS)
    assert_no_worse([got[0], *got[2:]], [plain[0], *plain[2:]], [exact[0], *exact[2:]])


def test_parameters_that_need_gradients_and_empty_lists() -> None:
    leaf = draw(3).requires_grad_()
    before = leaf.detach().clone()
    adamw_([leaf], [draw(3)], [torch.zeros(3).double()], [torch.zeros(3).double()], step=1, **OPTIONS)
    assert leaf.is_leaf
    assert leaf.grad_fn is None
    assert not torch.equal(leaf.detach(), before)
    adamw_([], [], [], [], step=1, **OPTIONS)


def test_validation() -> None:
    def call(lists: list[list[Any]], **options: Any) -> None:
        adamw_(*lists, **({"step": 1} | OPTIONS | options))

    good: list[list[Any]] = [[torch.ones(2)] for _ in range(4)]
    for step in (0, -1):
        with pytest.raises(ValueError, match=f"^step: .*{step}"):
            call(good, step=step)
        with pytest.raises(ValueError, match=r"^step: "):
            call([[], [], [], []], step=step)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"^seed: "):
            call(good, seed=seed)
    for skip in (torch.zeros(1, dtype=torch.bool), torch.zeros(()), torch.zeros((), dtype=torch.bool, device="meta")):
        with pytest.raises(ValueError, match=r"^skip: "):
            call(good, skip=skip)
    with pytest.raises(ValueError, match=r"^params: 1 tensors, but .*2 copies"):
        call(good, copies=[None, None])
    eight = State8.zeros_like(torch.ones(2), signed=True)
    wrong = [torch.ones(1), torch.ones(2, device="meta")]
    other = [torch.ones(2).half(), torch.ones(2).double(), eight, torch.ones(2, dtype=torch.uint8)]
    integer = torch.ones(2, dtype=torch.int32)
    bad = {"params": [integer], "grads": [*wrong, integer], "exp_avgs": wrong + other, "exp_avg_sqs": wrong + other}
    for i, (name, members) in enumerate(bad.items()):
        if i:
            with pytest.raises(ValueError, match=r"^params: 1 tensors, but .*0 " + name):
                call([*good[:i], [], *good[i + 1 :]])
        for member in members:
            with pytest.raises(ValueError, match=rf"^{name}\[0\]: |^exp_avg_sqs\[0\]: .*signed=False"):
                call([*good[:i], [member], *good[i + 1 :]])
    for member in (*wrong, integer):
        with pytest.raises(ValueError, match=r"^copies\[0\]: "):
            call(good, copies=[member])
    both = [[State8.zeros_like(torch.ones(2), signed=signed)] for signed in (True, False)]
    call([*good[:2], *both])
    with pytest.raises(ValueError, match=r"^exp_avgs\[0\]: "):
        call([*good[:2], *both[::-1]])
    with pytest.raises(ValueError, match=r"^exp_avgs\[0\]: "):
        call([[torch.ones(2).double()], good[1], *both])
    with pytest.raises(ValueError, match=r"^backend: "):
        call(good, backend="cuda")


# The parameters', the moments', the gradients' and the copies' types: as trained with masters, plain, and mixed.
TYPES = [
    (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, torch.float32, None),
    (torch.float16, torch.float32, torch.float16, None),
]


def states(param: Tensor, kind: Any) -> list[Any]:
    """Both moments of a parameter, zero: `kind` is their dtype, or State8."""
    if kind is State8:
        return [State8.zeros_like(param, signed=signed) for signed in (True, False)]
    return [torch.zeros_like(param, dtype=kind) for _ in range(2)]


def values(x: Any) -> Tensor:
    return x.dequantize() if isinstance(x, State8) else x.double()


def run(sizes: list[int], types: tuple[Any, ...], backend: str, steps: int = 2, **options: Any) -> list[Tensor]:
    """Parameters, moments and copies after `steps` updates of tensors of these sizes, flat."""
    dtype, kind, grad, copy = types
    params = [draw(n, seed=n, dtype=dtype).to(DEVICE) for n in sizes]
    moments = list(zip(*(states(p, kind) for p in params))) or [(), ()]
    copies = [None if copy is None else torch.full_like(p, torch.nan, dtype=copy) for p in params]
    for step in range(1, steps + 1):
        grads = [draw(n, seed=n + step, dtype=grad).to(DEVICE) for n in sizes]
        arguments = {"copies": copies, "backend": backend} | OPTIONS | options
        adamw_(params, grads, *moments, step=step, **arguments)
    return [*params, *(x for xs in moments for x in xs), *(x for x in copies if x is not None)]


@DRAWN
@given(sizes=st.lists(st.sampled_from([0, 1, 7, 255, 512, 513, 1200]), max_size=4), types=st.sampled_from(TYPES))
def test_triton(sizes: list[int], types: tuple[Any, ...]) -> None:
    exact = run(sizes, (torch.float64, torch.float64, types[2], types[3] and torch.float64), "torch")
    got, plain = (run(sizes, types, backend) for backend in ("triton", "torch"))
    assert_no_worse(got, plain, exact)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, where the interpreter rounds to infinity
@BACKENDS
@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16])
def test_copies_are_the_rounded_parameters(backend: str, copy: torch.dtype) -> None:
    ties = 1 + torch.arange(-64, 64) / 2**8  # of bf16: to even
    param = torch.cat([draw(600, dtype=torch.float32), ties, torch.tensor([torch.nan, torch.inf, -torch.inf, 3.39e38])])
    params = [param.clone().to(DEVICE) for _ in range(2)]
    grads = [torch.zeros_like(p) for p in params]
    given: list[Any] = [torch.zeros_like(params[0], dtype=copy), None]
    moments = zip(*(states(p, torch.float32) for p in params))
    options = OPTIONS | {"weight_decay": 0.0}
    adamw_(params, grads, *moments, copies=given, step=1, backend=backend, **options)
    torch.testing.assert_close(given[0], params[0].to(copy), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("types", [*TYPES, (torch.bfloat16, State8, torch.bfloat16, None)])
@pytest.mark.parametrize("shift", [0, 1])
def test_triton_stays_inside_tensors_at_any_address(types: tuple[Any, ...], shift: int) -> None:
    """Tensors in the middle of larger ones, at addresses that 16 divides and at others; the last chunk is ragged."""
    dtype, kind, grad, copy = types

    def inside(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        room = torch.full((64 + shift + 700 + 64,), 7, dtype=dtype, device=DEVICE)
        return room, room[64 + shift :][:700]

    rooms = [inside(x) for x in (dtype, *([torch.uint8] * 2 if kind is State8 else [kind] * 2), copy or torch.float32)]
    param, *moments, given = (view for _, view in rooms)
    if kind is State8:
        moments = [State8(x, torch.ones(3, device=DEVICE), signed) for x, signed in zip(moments, (True, False))]
    before = [room.clone() for room, _ in rooms]
    gradient = inside(grad)[1].fill_(3)
    adamw_([param], [gradient], *([m] for m in moments), copies=[None if copy is None else given], step=1,
           backend="triton", **OPTIONS)  # fmt: skip
    for (room, view), old in zip(rooms[: 3 + (copy is not None)], before):
        changed = room != old
        assert changed[64 + shift :][:700].all() or view.dtype == torch.uint8
        changed[64 + shift :][:700] = False
        assert not changed.any()


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", [torch.bfloat16, State8])
def test_triton_chunks_do_not_matter(seed: int | None, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, types = [3, 1300, 0, 513], (torch.bfloat16, kind, torch.bfloat16, None)
    row = {**launch.config("adamw", DEVICE), "capability": launch.capability(DEVICE)}
    want = run(sizes, types, "triton", seed=seed)
    for rows in (1, 4):
        monkeypatch.setitem(launch.table(), "adamw", [{**row, "ROWS": rows}])
        launch._config.cache_clear()
        got = run(sizes, types, "triton", seed=seed)
        assert all(torch.equal(values(a), values(b)) for a, b in zip(got, want))
    monkeypatch.undo()
    launch._config.cache_clear()


@BACKENDS
@pytest.mark.parametrize("types", [*TYPES, (torch.bfloat16, State8, torch.bfloat16, None)])
def test_a_skipped_update_changes_nothing(types: tuple[Any, ...], backend: str) -> None:
    """Not even by gradients that are not finite; and where `skip` is false, the bits are those of an update without."""
    sizes, seed = [700, 3], 1 if types[3] is None and types[0] == torch.bfloat16 else None
    yes, no = (torch.tensor(flag, device=DEVICE) for flag in (True, False))
    plain, taken = (run(sizes, types, backend, seed=seed, **options) for options in ({}, {"skip": no}))
    assert all(torch.equal(values(a), values(b)) for a, b in zip(plain, taken))
    params = [draw(n, seed=n, dtype=types[0]).to(DEVICE) for n in sizes]
    moments = list(zip(*(states(p, types[1]) for p in params)))
    copies = [None if types[3] is None else p.to(types[3]) for p in params]
    held = [*params, *moments[0], *moments[1], *(c for c in copies if c is not None)]
    grads = [draw(n, seed=n + 1, dtype=types[2]).to(DEVICE) for n in sizes]
    arguments: dict[str, Any] = {"copies": copies, "seed": seed, "backend": backend} | OPTIONS
    adamw_(params, grads, *moments, step=1, **arguments)  # moments that are not zero
    before = [x.clone() if isinstance(x, Tensor) else (x.codes.clone(), x.absmax.clone()) for x in held]
    for grad in grads:
        grad[1] = torch.nan
    adamw_(params, grads, *moments, step=2, skip=yes, **arguments)
    for now, then in zip(held, before):
        pairs = [(now, then)] if isinstance(now, Tensor) else [(now.codes, then[0]), (now.absmax, then[1])]
        assert all(torch.equal(a, b) for a, b in pairs)
    adamw_(params, grads, *moments, step=2, skip=no, **arguments)
    assert params[0].isnan().any()


def clock(step: int, lr: float) -> dict[str, Tensor]:
    """Step and rate as tensors, as a CUDA graph takes them."""
    count = torch.tensor(step, dtype=torch.int64, device=DEVICE)
    return {"step": count, "lr": torch.tensor(lr, dtype=torch.float64, device=DEVICE)}


FIXED = [(types, "triton") for types in [*TYPES, (torch.bfloat16, State8, torch.bfloat16, None)]]
FIXED += [(types, "torch") for types in TYPES[:2]]


@pytest.mark.parametrize(("types", "backend"), FIXED)
def test_a_step_and_a_rate_on_the_device_give_the_same_bits(
    types: tuple[Any, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they change in place, as between two replays of a graph, and where the update is skipped. Nothing is
    read on the host."""
    sizes, seed = [700, 3], 5 if types[3] is None and types[0] == torch.bfloat16 else None
    now, no = clock(1, 0.0), torch.tensor(False, device=DEVICE)
    left: list[list[Any]] = []
    for fixed in (False, True):
        params = [draw(n, seed=n, dtype=types[0]).to(DEVICE) for n in sizes]
        moments = list(zip(*(states(p, types[1]) for p in params)))
        copies = [None if types[3] is None else p.to(types[3]) for p in params]
        grads = [draw(n, seed=n + 1, dtype=types[2]).to(DEVICE) for n in sizes]
        options: dict[str, Any] = OPTIONS | {"copies": copies, "seed": seed, "backend": backend}
        for step, lr in ((1, 0.03), (2, 0.02), (3, 0.01)):
            if not fixed:
                adamw_(params, grads, *moments, **options | {"step": step, "lr": lr})
                continue
            now["step"].fill_(step)
            now["lr"].fill_(lr)
            with monkeypatch.context() as patch:
                for read in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
                    patch.setattr(Tensor, read, None)
                adamw_(params, grads, *moments, skip=no, **options | now)
        held = [*params, *moments[0], *moments[1], *(c for c in copies if c is not None)]
        left.append([values(x).clone() for x in held])
        if fixed:
            for grad in grads:
                grad.fill_(torch.nan)
            adamw_(params, grads, *moments, skip=~no, **options | now)
            left.append([values(x) for x in held])
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*left, strict=True))


def test_what_of_step_and_rate_does_not_fit_is_refused() -> None:
    lists: list[Any] = [[torch.ones(2)] for _ in range(4)]
    rest = {name: OPTIONS[name] for name in ("betas", "eps", "weight_decay")}
    good = {name: x.cpu() for name, x in clock(1, 0.1).items()}
    wrong = [("step", good["step"].float()), ("step", good["step"][None]), ("lr", good["lr"].float()), ("lr", 0.1)]
    for name, value in [*wrong, ("step", good["step"].to("meta"))]:
        with pytest.raises(ValueError, match=f"^{name}|^step and lr"):
            adamw_(*lists, **rest, **good | {name: value})
    for other in ([State8.zeros_like(torch.ones(2), signed=signed)] for signed in (True, False)):
        lists[3 if not other[0].signed else 2] = other
    with pytest.raises(ValueError, match=r"^step: a tensor needs the Triton kernels"):
        adamw_(*lists, **rest, **good, backend="torch")


@pytest.mark.gpu
def test_nothing_waits_for_skip() -> None:
    types = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    param, grad, copy = (draw(900, seed=1, dtype=types[i]).cuda() for i in (0, 2, 3))
    m, v = states(param, types[1])

    def update(step: int) -> None:
        adamw_([param], [grad], [m], [v], step=step, copies=[copy], skip=grad.isnan().any(), **OPTIONS)

    update(1)  # compiles, and makes the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, State8])
def test_seeds(backend: str, kind: Any) -> None:
    types = (torch.bfloat16, kind, torch.bfloat16, None)
    first, again, other = (run([900], types, backend, steps=1, seed=seed) for seed in (2**32 - 1, 2**32 - 1, 2))
    nearest = run([900], types, backend, steps=1)
    assert all(torch.equal(values(a), values(b)) for a, b in zip(first, again))
    for result in (first, other):
        assert not torch.equal(result[0], nearest[0])
        # One bf16 step at most from the nearest.
        torch.testing.assert_close(result[0], nearest[0], rtol=2**-7, atol=0)
    assert not torch.equal(first[0], other[0])
    param = torch.ones(900, dtype=torch.bfloat16, device=DEVICE)
    steps = [param.clone() for _ in range(2)]
    for i, p in enumerate(steps):
        m = states(p, kind)
        adamw_(
            [p],
            [torch.zeros_like(p)],
            *([x] for x in m),
            step=1 + i,
            seed=1,
            backend=backend,
            **(OPTIONS | {"lr": 0.003}),
        )
    assert not torch.equal(*steps)


@BACKENDS
def test_stochastic_rounding_has_no_bias(backend: str) -> None:
    n = 20_000
    param, grad = torch.ones(n, dtype=torch.bfloat16, device=DEVICE), torch.full((n,), 0.3, device=DEVICE)
    m, v = states(param, torch.bfloat16)
    options: dict[str, Any] = {"lr": 0.001, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5}
    adamw_([param], [grad], [m], [v], step=1, seed=3, backend=backend, **options)
    want = (1 * (1 - 0.0005) - 0.001, 0.1 * 0.3, 0.01 * 0.09)
    ups = []
    for x, mean in zip((param, m, v), want):
        assert len(x.unique()) == 2
        low, high = x.double().min(), x.double().max()
        assert low < mean < high
        up = (x.double() - low) / (high - low)
        share = (mean - low) / (high - low)
        assert abs(up.mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
        ups.append(up - up.mean())
    # Neither neighbours nor the three roundings of an element go together.
    pairs = [(a, b) for i, a in enumerate(ups) for b in ups[:i]] + [(a[k:], a[:-k]) for a in ups for k in (1, 2, 3, 4)]
    for a, b in pairs:
        assert abs((a * b).mean() / (a.std() * b.std())) < 5 / n**0.5


@BACKENDS
def test_small_updates_move_bf16_parameters_with_a_seed_only(backend: str) -> None:
    steps = 1000 if backend == "torch" or DEVICE.type == "cuda" else 50  # the interpreter takes 20 ms a step
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "backend": backend}
    for seed in (None, 7):
        param = torch.ones(512, dtype=torch.bfloat16, device=DEVICE)
        m, v = states(param, torch.float32)
        for step in range(1, steps + 1):
            adamw_([param], [torch.ones_like(param)], [m], [v], step=step, seed=seed, **options)
        if seed is None:
            assert (param == 1).all()
        else:
            # A rounding up or down has a deviation of half a place at most, which is 2^-9 below 1.
            deviation = steps**0.5 * 2**-9
            assert abs(param.double().mean() - (1 - 1e-3 * steps)) < 5 * deviation / len(param) ** 0.5
            assert param.double().std() < 1.2 * deviation


@BACKENDS
def test_stochastic_rounding_keeps_what_needs_no_rounding(backend: str) -> None:
    exact = torch.tensor([1.0, -0.0, 0.0, 2.0**-130, -3.0, torch.inf, -torch.inf, torch.nan], dtype=torch.bfloat16)
    param = exact.to(DEVICE)
    m, v = states(param, torch.float32)
    options = OPTIONS | {"weight_decay": 0.0}
    for seed in range(5):
        adamw_([param], [torch.zeros_like(param)], [m], [v], step=1, seed=seed, backend=backend, **options)
    torch.testing.assert_close(param.cpu(), exact, rtol=0, atol=0, equal_nan=True)


def assert_nearest(held: Tensor, exact: Tensor, signed: bool, slack: float = 0.0) -> None:
    """A block is held by the nearest codes of `exact`, fp64 (n,), of which the held values may have missed `slack`.

    A value is scaled by a rounded reciprocal and compared with a rounded midpoint, and its code times absmax is
    rounded: four roundings of half an eps, the first two of which count twice where the other code is nearer by less
    than them.
    """
    code = dynamic_code(signed, exact.device).double() * exact.abs().max()
    distance = (exact[:, None] - code).abs()
    if not signed:
        distance[exact > 0, 0] = torch.inf  # A value above 0 is kept off 0.
    error = (held.double() - exact).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= distance.min(dim=1).values + 4 * eps * (exact.abs() + held.abs()) + 4 * slack).all()


def test_state8_holds_values_to_the_nearest_code() -> None:
    x = draw(1000, dtype=torch.float32) * torch.logspace(-6, 6, 1000)
    x[256:512] = 0
    for signed in (True, False):
        values = x if signed else x.square()
        state = State8.zeros_like(values, signed=signed)
        assert torch.equal(state.dequantize(), torch.zeros(1000))
        state.quantize_(values)
        for start in range(0, 1000, 256):
            assert_nearest(state.dequantize()[start:][:256], values[start:][:256].double(), signed)
        if not signed:
            assert (state.dequantize()[values > 0] > 0).all()


def test_state8_follows_fp32_moments() -> None:
    """Over 100 steps of a noisy quadratic whose curvatures differ, as gradients within a block do."""
    target, curvature = draw(1500, dtype=torch.float32), torch.logspace(-2, 1, 1500)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    ends = []
    for kind in (torch.float32, State8):
        param = torch.zeros(1500)
        m, v = states(param, kind)
        for step in range(1, 101):
            grad = curvature * (param - target) + 0.1 * draw(1500, seed=step, dtype=torch.float32)
            adamw_([param], [grad], [m], [v], step=step, **options)
        ends.append(param)
    # A code is off by half a gap. For a value above a tenth of its absmax that is relative to it ten times as much, and
    # half of that for sqrt(v). Errors of different steps do not add up, as their signs differ.
    gaps = [float(dynamic_code(signed, torch.device("cpu")).diff().max()) for signed in (True, False)]
    relative = 10 * (gaps[0] / 2 + gaps[1] / 4)
    error, moved = (ends[1] - ends[0]).abs(), ends[0].abs()
    assert error.mean() < relative * moved.mean()
    assert error.max() < relative * moved.max()


@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "grad", "copy"),
    [(torch.float32, torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32, None)],
)
def test_state8_updates(backend: str, dtype: torch.dtype, grad: torch.dtype, copy: torch.dtype | None) -> None:
    """Each update is the formula's in float64, from what the codes held before, and takes the nearest codes."""
    eps, beta1, beta2 = torch.finfo(torch.float32).eps, *OPTIONS["betas"]
    params = [draw(n, seed=n, dtype=dtype).to(DEVICE) for n in (0, 1, 255, 1200, 512)]
    moments = list(zip(*(states(p, State8) for p in params)))
    copies = [None if copy is None else torch.full_like(p, torch.nan, dtype=copy) for p in params]
    for step in (1, 2):
        grads = [draw(len(p), seed=len(p) + step, dtype=grad).to(DEVICE) for p in params]
        before = [[x.clone().double() for x in map(values, (p, m, v))] for p, m, v in zip(params, *moments)]
        adamw_(params, grads, *moments, copies=copies, step=step, backend=backend, **OPTIONS)
        for p, g, m, v, c, (p_old, m_old, v_old) in zip(params, grads, *moments, copies, before):
            m_terms = [beta1 * m_old, (1 - beta1) * g.double()]
            exact = [p_old, sum(m_terms), beta2 * v_old + (1 - beta2) * g.double().square()]
            size = sum(x.abs() for x in m_terms)
            for start in range(0, len(p), 256):
                place = slice(start, start + 256)
                for state, want, signed, largest in ((m, exact[1], True, size), (v, exact[2], False, exact[2])):
                    # Two factors, two products and a sum are rounded.
                    slack = 4 * eps * float(largest[place].max())
                    assert abs(state.absmax[start // 256] - want[place].abs().max()) <= slack
                    assert_nearest(state.dequantize()[place], want[place], signed, slack)
            # The update's own roundings are fewer than eight, and m's are those of its terms.
            denominator = exact[2].sqrt() * (1 - beta2**step) ** -0.5 + OPTIONS["eps"]
            rate = OPTIONS["lr"] / (1 - beta1**step)
            want = (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) * p_old - rate * exact[1] / denominator
            bound = 8 * eps * (p_old.abs() + rate * size / denominator) + torch.finfo(dtype).eps / 2 * want.abs()
            assert ((p.double() - want).abs() <= bound).all()
            if c is not None:
                assert torch.equal(c, p.to(c.dtype))


@BACKENDS
def test_state8_second_moment_stays_off_zero(backend: str) -> None:
    param, grad = torch.ones(300, device=DEVICE), torch.logspace(-8, 0, 300, device=DEVICE)
    m, v = states(param, State8)
    adamw_([param], [grad], [m], [v], step=1, backend=backend, **OPTIONS)
    assert (v.dequantize() > 0).all()
    assert (m.dequantize() == 0).any()


def test_stochastic_rounding_takes_one_of_both_neighbours() -> None:
    x = torch.cat([draw(5000, dtype=torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    got = _stochastic(x, torch.Generator().manual_seed(0))
    below = (x.view(torch.int32) & -65536).view(torch.float32)  # cut off
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    exact = below == x
    assert torch.equal(got[exact].float(), x[exact])
    assert got[-1].isnan()
    drawn = ~exact & x.isfinite()
    assert ((got == below) | (got == above))[drawn].all()
    assert (got == below)[drawn].any()
    assert (got == above)[drawn].any()


def test_tables_name_each_chunk_once() -> None:
    lines = [(0,) * 4 + (numel,) + (0,) * 3 for numel in (0, 1, 1024, 1025, 5000)]
    tensors, chunks = _tables(lines, 1024, DEVICE)
    assert tensors.tolist() == [list(line) for line in lines]
    assert chunks.tolist() == [[1, 0], [2, 0], [3, 0], [3, 1], *([4, i] for i in range(5))]


def test_wide_loads_are_for_aligned_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments: seen.append(arguments["variant"].ALIGNED))
    for odd in range(6):
        tensors = [torch.ones(65, dtype=torch.bfloat16, device=DEVICE)[i == odd :][:64] for i in range(5)]
        p, g, m, v, copy = tensors
        adamw_([p], [g], [m], [v], copies=[copy], step=1, backend="triton", **OPTIONS)
    assert seen == [False] * 5 + [True]


def test_triton_plans_follow_their_tensors() -> None:
    param = torch.nn.Parameter(torch.ones(40, device=DEVICE))
    m, v = states(param.detach(), torch.float32)

    def step(grad: Tensor, param: Tensor, m: Tensor, v: Tensor) -> None:
        adamw_([param], [grad], [m], [v], step=1, backend="triton", **OPTIONS)

    held = len(_plans)
    y = (param * param).sum()
    step(torch.ones(40, device=DEVICE), param, m, v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    once = param.detach().clone()
    old = param.data
    param.data = torch.ones(40, device=DEVICE)
    for x in (m, v):
        x.zero_()
    step(torch.ones(40, device=DEVICE), param, m, v)
    assert torch.equal(param.detach(), once)
    assert torch.equal(old, once)
    param.data = param.data[:30].clone()
    with pytest.raises(ValueError, match=r"^grads\[0\]: "):
        step(torch.ones(40, device=DEVICE), param, m, v)
    with pytest.raises(ValueError, match=r"^exp_avgs\[0\]: "):
        step(torch.ones(30, device=DEVICE), param, m, v)
    assert len(_plans) == held + 1
    del y, param, m, v
    gc.collect()
    assert len(_plans) == held
