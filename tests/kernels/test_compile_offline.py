"""Every Triton kernel variant compiles to machine code for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Different binaries by the file of their kernel, the same for every target; those of class_maps are its two parts'. 200 for
#: weighted_reduce: 6 poolings, with and without a Hessian-vector product, 4 dtypes and 4 kinds of tile, 7 more views, and one
#: pair of dtypes. A launcher that specialises on more, or on less, changes these numbers.
VARIANTS = {
    "weighted_reduce": 200,
    "channel_weighted_sum": 36,
    "utility_rows": 28,
    "quadrature_rows": 43,
    "display_map": 41,
    "overlay": 11,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


def compile_for(target: str, cache: Path, script: tuple[str, ...] = ("-m", "tests.kernels.compile_offline"), every: int = 1):
    # Elsewhere, since this process has imported the kernels for the interpreter; and into an empty cache.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *script, target, str(every)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_some_variants_of_every_operator_compile(target, tmp_path):
    done = compile_for(target, tmp_path, every=10)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert set(report["variants"]) == set(VARIANTS)
    assert sum(report["variants"].values()) >= 20


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant_compiles(target, tmp_path):
    done = compile_for(target, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    variants = report["variants"]
    print(f"{target}: {sum(variants.values())} variants compiled of {sum(VARIANTS.values())}, {report['seconds']} s")
    assert variants == VARIANTS


def test_a_kernel_that_does_not_compile_fails(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys, torch, triton, triton.language as tl\n"
        "from tests.kernels import compile_offline\n"
        "@triton.jit\n"
        "def broken(a):\n"
        "    tl.store(a, tl.dot(1, 2))\n"
        "compile_offline.calls = lambda: [('broken', lambda: broken[(1,)](compile_offline.empty(1)))]\n"
        "compile_offline.main(sys.argv[1:])\n"
    )
    done = compile_for(
        "sm_80", tmp_path / "cache", ("-c", f"import sys; sys.path[:0] = ['.', {str(tmp_path)!r}]; import broken")
    )
    assert done.returncode != 0
    assert "CompilationError" in done.stderr


def test_the_interpreter_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_offline", "sm_80"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr
