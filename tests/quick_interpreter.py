"""Triton's interpreter without what it does for nothing: tests on a machine without a GPU take half the time with it.

What a kernel computes stays the same. Import it once the interpreter has been chosen (conftest.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


def install() -> None:
    # It computes every sum, difference and product of integers in 64 bits as well, for a check of overflow that is then
    # only made where `debug` is set, which nothing can do.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # It makes the table of all types anew each time that it looks into it.
    table: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype

    def look_up_once(kind: Any) -> Any:
        if kind.name not in table:
            table[kind.name] = look_up(kind)
        return table[kind.name]

    interpreter._get_np_dtype = look_up_once

    # Shapes are its tuples, and each of them is given the type of what it holds, which only the compiler reads.
    make, kind_of = core.tuple.__init__, core._type_for_tuple_values

    def make_untyped(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values, self._kind = list(args), None
        else:
            make(self, args, type)

    def kind(self: Any) -> Any:
        if self._kind is None:
            self._kind = kind_of(self.values)
        return self._kind

    core.tuple.__init__ = make_untyped
    core.tuple.type = property(kind, lambda self, kind: setattr(self, "_kind", kind))

    # The type of a block is made for each result, with its shape's check and its name.
    known: dict[tuple[Any, ...], tuple[Any, int, str]] = {}
    describe = core.block_type.__init__

    def describe_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = element_ty.name, *[x.value if isinstance(x, core.constexpr) else x for x in sizes]
        if key in known:
            self.element_ty, (self.shape, self.numel, self.name) = element_ty, known[key]
        else:
            describe(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name

    core.block_type.__init__ = describe_once

    # Before a kernel runs, and again before each function that it calls, it looks through the hundreds of names of the
    # language for what is to be replaced. At the second call of a file's functions nothing is, until the kernel ends.
    replaced: set[int] = set()  # by a running kernel: the ids of the globals of these files
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(id(function.__globals__))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_once, patch_once
