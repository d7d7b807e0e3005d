"""The house's floors: who may import whom, the links, no initialisers that shadow other packages, tests for all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO

# The rooms of each floor may import what is named here, and themselves.
GROUND = {"errors", "durable", "inside", "manifest", "printable", "signals", "streams", "__version__"}
BASEMENT = {"engine", "kernels", "loaders"}
FLOORS: dict[str, set[str]] = {
    "kernels": GROUND,
    "loaders": GROUND,
    "engine": GROUND | {"kernels", "loaders"},
    "afina/export": GROUND | BASEMENT,
    "afina/report": GROUND | BASEMENT,
    "afina/advise": GROUND | BASEMENT,
    "afina/serve": GROUND | BASEMENT,
    "afina/cli": GROUND | BASEMENT | {"advise", "export", "report", "serve"},
}


def statements(file: Path, *, types: bool = True) -> Iterator[ast.AST]:
    """Every node of a file, functions included; without ``types`` none of what only a type checker reads."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        yield node
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting += ast.iter_child_nodes(node)


def imported(file: Path, *, types: bool = True) -> set[str]:
    """Dotted names that ``file`` imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in statements(file, types=types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_stay_on_their_floors(floor: str) -> None:
    files = sorted((REPO / floor).rglob("*.py"))
    assert files, f"no files in {floor}/"
    for file in files:
        for name in imported(file):
            top = name.split(".")[0]
            assert top not in BASEMENT | {"tests", "benchmarks"}, f"{file} imports {name}"
            if name.startswith("afina."):
                room = name.split(".")[1]
                assert room in FLOORS[floor] | {floor.rpartition("/")[2]}, f"{file} imports {name}"


@pytest.mark.parametrize("name", ["errors", "durable", "inside", "manifest", "printable", "signals", "streams"])
def test_the_ground_floor_stands_on_the_standard_library(name: str) -> None:
    for target in imported(REPO / "afina" / f"{name}.py"):
        top = target.split(".")[0]
        ours = top == "afina" and target.split(".")[1] in GROUND
        assert top in sys.stdlib_module_names or ours, f"{name} imports {target}"


def modules() -> dict[str, Path]:
    """Our modules by dotted name."""
    found = {}
    for folder in ("afina", *sorted(BASEMENT)):
        for file in (REPO / folder).rglob("*.py"):
            name = file.relative_to(REPO).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            found[name if folder == "afina" else f"afina.{name}"] = file
    return {name: file for name, file in found.items() if not file.is_relative_to(REPO / "afina" / "data")}


def import_graph() -> dict[str, set[str]]:
    """Which of our modules each imports, also inside a function, but not for the type checker alone."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        targets = imported(file, types=False)
        # ``from afina.kernels import launch`` names a module, ``from afina.errors import nearest`` a part of one.
        graph[name] = {t if t in known else t.rpartition(".")[0] for t in targets} & known.keys() - {name}
    return graph


def test_no_import_circles() -> None:
    graph = import_graph()
    assert {"afina.kernels.backend", "afina.engine.train", "afina.cli.main"} <= graph.keys()
    assert "afina.kernels.attention" in graph["afina.engine.model"]
    while leaves := [name for name, targets in graph.items() if not targets]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: targets - set(leaves) for name, targets in graph.items()}
    assert not graph, f"import circles, or what hangs on them: {graph}"


def test_verbs_do_not_import_each_other() -> None:
    verbs = {file.stem for file in (REPO / "afina" / "cli").glob("*.py")} - {"__init__", "main", "options"}
    for verb in verbs:
        others = {
            name.split(".")[2] for name in imported(REPO / "afina" / "cli" / f"{verb}.py") if "afina.cli." in name
        }
        assert others <= {"options", f"{verb}_story", f"{verb}_checks", f"{verb}_table"}, f"{verb} imports {others}"


@pytest.mark.parametrize("floor", sorted(BASEMENT))
def test_links_and_no_initialisers(floor: str) -> None:
    link = REPO / "afina" / floor
    assert link.is_symlink()
    assert link.resolve() == REPO / floor
    assert not list((REPO / floor).rglob("__init__.py")), "an initialiser here would overwrite other packages"


# Files that are only reached through another one, whose tests they share: their path without suffix -> its tests.
TESTED_WITH = {
    "kernels/adamw_torch": "kernels/test_adamw",
    "kernels/adamw_triton": "kernels/test_adamw",
    "kernels/attention_gluon_backward": "kernels/test_attention_gluon",
    "kernels/attention_torch": "kernels/test_attention",
    "kernels/attention_triton": "kernels/test_attention",
    "kernels/cases": "kernels/test_selftest",
    "kernels/cross_entropy_chunks": "kernels/test_cross_entropy",
    "kernels/cross_entropy_torch": "kernels/test_cross_entropy",
    "kernels/cross_entropy_triton": "kernels/test_cross_entropy",
    "kernels/norm_triton": "kernels/test_norm",
    "kernels/rope_torch": "kernels/test_rope",
    "kernels/rope_triton": "kernels/test_rope",
    "engine/known_models": "engine/test_plan",
    "engine/lm_eval_file": "engine/test_lm_eval_task",
    "engine/questions": "engine/test_tasks",
    "engine/task_results": "engine/test_tasks",
    "engine/rope_tables": "engine/test_model_config",
    "engine/decode_step": "engine/test_batcher",
    "engine/guesses": "engine/test_batcher",
    "engine/kv_pool": "engine/test_batcher",
    "engine/packed": "engine/test_batcher",
    "engine/prefill": "engine/test_batcher",
    "engine/row": "engine/test_batcher",
    "engine/row_exact": "engine/test_batcher",
    "engine/sampler": "engine/test_generate",
    "engine/sampling": "engine/test_generate",
    "engine/recipe_file": "engine/test_train_config",
    "engine/text_stream": "engine/test_generate",
    "engine/settings": "engine/test_train_config",
    "loaders/data/check_findings": "loaders/data/test_check",
    "loaders/data/check_rows": "loaders/data/test_check",
    "loaders/data/check_tokens": "loaders/data/test_check",
    "loaders/data/token_pass": "loaders/data/test_dataset",
    "loaders/text/backend_checks": "loaders/text/test_tokenizer",
    "loaders/text/meter": "loaders/text/test_chat_template",
    "loaders/text/sandbox": "loaders/text/test_chat_template",
    "loaders/text/train_bpe": "loaders/text/test_tokenizer",
    "loaders/text/source": "loaders/weights/test_source",
    "loaders/weights/bitsandbytes": "engine/test_nf4_weight",
    "loaders/weights/stream": "loaders/weights/test_safetensors",
    "afina/advise/answers": "advise/test_measure",
    "afina/advise/evidence": "advise/test_decision",
    "afina/advise/recipe": "advise/test_measure",
    "afina/advise/verdict": "advise/test_decision",
    "afina/advise/training": "advise/test_measure",
    "afina/cli/chat": "cli/test_main",
    "afina/cli/check": "cli/test_check_verb",
    "afina/cli/demo": "cli/test_main",
    "afina/cli/demo_story": "cli/test_demo",
    "afina/cli/doctor": "cli/test_main",
    "afina/cli/doctor_checks": "cli/test_doctor",
    "afina/cli/eval_table": "cli/test_eval",
    "afina/cli/export": "cli/test_main",
    "afina/cli/fetch": "loaders/weights/test_package_index",
    "afina/cli/generate": "cli/test_main",
    "afina/cli/options": "cli/test_main",
    "afina/cli/plan": "cli/test_plan_verb",
    "afina/cli/train": "cli/test_main",
    "afina/export/compare": "export/test_export",
    "afina/export/publication": "export/test_export",
    "afina/report/inspected": "report/test_inspect_page",
    "afina/cli/report": "cli/test_report_verb",
    "afina/cli/serve": "cli/test_serve_verb",
    "afina/serve/answers": "serve/test_api",
    "afina/serve/app": "serve/test_api",
    "afina/serve/body": "serve/test_server",
    "afina/serve/config": "cli/test_serve_verb",
    "afina/serve/errors": "serve/test_requests",
    "afina/serve/fields": "serve/test_requests",
    "afina/serve/guard": "serve/test_server",
    "afina/serve/metrics": "serve/test_api",
    "afina/serve/protocol": "serve/test_server",
    "afina/serve/tokens": "serve/test_api",
    "afina/serve/worker": "serve/test_server",
    "afina/report/budget": "report/test_report",
    "afina/report/finetune": "report/test_report",
    "afina/report/measure": "report/test_report",
    "afina/report/page_parts": "report/test_page",
    "afina/report/page_style": "report/test_page",
    "afina/report/run_models": "report/test_report",
    "afina/report/sections": "report/test_page",
}


def test_every_file_has_its_tests() -> None:
    for floor in FLOORS:
        for file in (REPO / floor).rglob("*.py"):
            name = file.relative_to(REPO).with_suffix("").as_posix()
            if file.stem == "__init__" or name.startswith("loaders/families/"):
                continue  # tests/loaders/families/test_families.py asks for a case of each family itself
            folder, _, stem = name.removeprefix("afina/").rpartition("/")
            tests = REPO / "tests" / f"{TESTED_WITH.get(name, f'{folder}/test_{stem}')}.py"
            assert tests.is_file(), f"{name}.py has no {tests.relative_to(REPO)}"


def test_public_names_resolve_and_import_stays_light() -> None:
    code = (
        "import sys, afina, afina.errors, afina.cli.main, afina.engine.train_config;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'import afina pulled in torch or numpy';"
        "[getattr(afina, name) for name in afina.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)
