"""What the Triton kernels compile to, for predictions: the committed facts and the page made of them."""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from bench import triton_facts, triton_model  # noqa: E402
from bench.cases import Case, cases  # noqa: E402
from bench.gpu_facts import Facts, flight, instructions  # noqa: E402
from bench.gpu_launches import Launch  # noqa: E402
from bench.gpu_model import A100, H100  # noqa: E402

CONTENT = json.loads(triton_model.FACTS.read_text())
MEAN = Case("weighted_reduce", "mean", (64, 2048, 49), triton_facts.torch.float32, "first")


def test_the_page_is_made_of_the_code_as_it_is(capsys):
    """By the hash of kernels/: nothing is compiled, so that this runs with every Triton."""
    assert triton_model.check() == 0, capsys.readouterr().out


def test_a_change_of_the_sources_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(triton_model, "digest", lambda: "another")
    assert triton_model.main([]) == 1
    assert "has changed" in capsys.readouterr().out


def test_a_new_case_is_noticed(monkeypatch, capsys):
    case = Case("weighted_reduce", "mean", (5, 8, 9), triton_facts.torch.float32, "first")
    monkeypatch.setattr(triton_model, "cases", lambda device: [case])
    assert triton_model.main([]) == 1
    assert f"no launches of {case.name!r}" in capsys.readouterr().out


def test_every_case_is_predicted_on_every_chip_and_called_a_prediction():
    rows = triton_model.rows_of(CONTENT)
    assert len(rows) == 3 * len(cases("cuda"))
    assert all(0 < row["of_copy"] < 1 for row in rows)
    assert "Predictions, not measurements" in triton_model.PAGE.read_text()


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_activations_are_read_in_loads_of_16_bytes_and_nothing_spills(chip):
    """Also where a channel begins anywhere, as with 7 x 7 positions; narrower loads are of channels' weights."""
    for name, kernel in CONTENT["chips"][chip]["kernels"].items():
        assert kernel["stack"] <= 16, name
        if name.startswith("weighted_reduce"):
            assert set(kernel["widths"]) == {"16"}, name
        elif name.startswith("channel_weighted_sum"):
            assert kernel["widths"]["16"] and set(kernel["widths"]) <= {"4", "8", "16"}, name


def test_a_load_outside_of_loops_is_under_way_until_its_use():
    code = instructions(
        "  /*0000*/  LDG.E.128 R4, desc[UR4][R2.64] ;\n.L_x_1:\n  /*0010*/  @P0 LDG.E R8, desc[UR4][R2.64] ;\n"
        "  /*0020*/  FADD R9, R9, R5 ;\n  /*0030*/  LDG.E R10, desc[UR4][R2.64] ;\n"
    )
    assert [triton_facts.operation(line) for line in code] == ["LDG.E.128", "LDG.E", "FADD", "LDG.E"]
    assert flight(code, turns=1) == 20


def test_a_tile_read_once_is_bound_by_the_memory_or_by_its_code():
    """2 MiB an image, once: what the model says by hand for instructions without end, and for none."""
    launch = Launch("weighted_reduce<mean, float32, has_h, flat, 64, 64>", (2048, 1, 1), 256, 0)
    work = triton_model.work(MEAN, launch, looping=False)
    assert work.loads == (3 * 64 * 2048 * 49 * 4,) and work.stores == 32 * 64 * 49 * 4 and work.in_memory
    loops = [triton_facts.Loop(0, 192, 16, 192, 0, True)]
    quick, slow = (
        triton_model.seconds(launch, Facts(32, 0, outside, 0, 0, loops), work, 4, H100, triton_model.ALL)
        for outside in (1, 10**5)
    )
    assert sum(work.loads) / H100.copy < quick < 1.6 * sum(work.loads) / H100.copy
    # 8 warps on 4 schedulers, 8 blocks at once, 2 waves of them: 16 x 10^5 / 0.8 cycles at least.
    assert slow == pytest.approx(2 * 16 * 10**5 / 0.8 / H100.clock, rel=0.05)


def test_the_library_sum_is_at_least_an_empty_launch_and_its_bytes():
    took = triton_model.library_sum(MEAN, 32, A100)
    assert took > A100.empty + 64 * 49 * 4 * 33 / A100.l2


def compared(chip: str, pattern: str, cache: Path) -> None:
    if triton.__version__ != CONTENT["triton"]:
        pytest.skip(f"the facts are of Triton {CONTENT['triton']}, this is {triton.__version__}, which may make other code")
    made = triton_facts.elsewhere(chip, pattern, cache)
    stored = CONTENT["chips"][chip]
    assert made["launches"] == {name: stored["launches"][name] for name in made["launches"]}
    assert made["launches"] and made["kernels"] == {name: stored["kernels"][name] for name in made["kernels"]}


@pytest.mark.slow
def test_some_committed_facts_are_those_of_the_compiled_code(tmp_path):
    compared("sm_90", "^(mean|elementwise) 64x2048x49 (float32|bfloat16) first$", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_the_committed_facts_are_those_of_the_compiled_code(chip, tmp_path):
    compared(chip, "", tmp_path)
