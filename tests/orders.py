"""Run the tests under other orders of summation: what holds on one machine's order only must not pass for right.

    python tests/orders.py                                       # every order that this CPU can run, the whole suite
    python tests/orders.py --only haswell two-threads -- tests/kernels -k attention

Each order is a pytest process with a few environment variables. What stands behind ``--`` goes to pytest. Prints a line
for each order and exits with 1 when one of them is red; the output of each is kept in ``.orders/NAME.log``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
ORDERS = {
    "plain": {},
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "prescott": {"OPENBLAS_CORETYPE": "Prescott"},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "mkl": {"MKL_CBWR": "COMPATIBLE"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
    "two-threads": {"OMP_NUM_THREADS": "2"},
}
VARIABLES = {name for variables in ORDERS.values() for name in variables}
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # as torch names them, each with the ones before it


def available() -> list[str]:
    """The orders that this CPU can run."""
    capability = torch.backends.cpu.get_cpu_capability()
    here = CAPABILITIES[: CAPABILITIES.index(capability) + 1] if capability in CAPABILITIES else CAPABILITIES[:1]
    return [name for name, v in ORDERS.items() if v.get("ATEN_CPU_CAPABILITY", "default").upper() in here]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ORDER", choices=list(ORDERS), help=f"of {', '.join(ORDERS)}")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="for pytest [the whole suite]")
    args = parser.parse_args()
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    logs = REPO / ".orders"
    logs.mkdir(exist_ok=True)
    red = []
    for name in args.only or available():
        started, log = time.monotonic(), logs / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args.pytest]
        with log.open("w") as file:
            status = subprocess.run(
                command, cwd=REPO, env=plain | ORDERS[name], stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        lines = log.read_text().splitlines()
        summary = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
        said = " ".join(["green" if status == 0 else f"red (exit status {status})", *summary[-1:]])
        print(f"{name:12} {time.monotonic() - started:6.0f} s  {said}", flush=True)
        if status:
            red.append(name)
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
