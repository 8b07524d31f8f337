"""The predictions about the CUDA kernels: how machine code is read, what the formulas say, and whether the page is current."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from bench import gpu_facts, gpu_model
from bench.cases import Case, cases
from bench.gpu_facts import Facts, Loop
from bench.gpu_launches import Launch, Launchers, launchers
from bench.gpu_model import A100, H100, Work

CODE = """\
.text._Zkernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_2:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x1000] ;
        /*0030*/                   FADD R20, R20, R5 ;
        /*0040*/                   LDG.E.U16 R12, desc[UR4][R16.64] ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   FMUL R20, R20, R20 ;
        /*0070*/                   FMUL R20, R20, R20 ;
.L_x_1:
        /*0080*/                   FADD R20, R20, R11 ;
        /*0090*/                   FADD R20, R20, R12 ;
        /*00a0*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   STG.E.64 desc[UR4][R2.64], R20 ;
        /*00d0*/               @P2 BRA `(.L_x_3) ;
        /*00e0*/                   SHFL.BFLY PT, R1, R20, 0x10, 0x1f ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""


def test_the_machine_code_is_read():
    """Two loads of 16 bytes are under way, then one of them and one of 2; the branch saves two of the loop's ten."""
    outside, barriers, shuffles, loops = gpu_facts.read(CODE)
    assert (outside, barriers, shuffles) == (3, 1, 1)
    assert loops == [Loop(instructions=8, loads=34, width=16, flight=32, stores=0, inner=True), Loop(3, 0, 0, 0, 8, True)]


def test_a_load_used_in_the_next_turn_is_under_way_until_then():
    body = ["FADD R9, R9, R4", "LDG.E R4, desc[UR4][R2.64]", "LDG.E R6, desc[UR4][R2.64]", "FADD R9, R9, R6"]
    assert gpu_facts.flight(body) == 8


ONE_LOOP = Facts(32, 0, 0, 0, 0, [Loop(10, 64, 16, 32, 0, True)])


@pytest.mark.parametrize("chip", [A100, H100])
def test_one_block_is_bound_by_its_rounds_of_loads(chip):
    """1 MiB by 256 threads with 32 bytes under way each: 128 rounds of the L2's latency."""
    took = gpu_model.seconds(Launch("k", (1, 1, 1), 256, 0), ONE_LOOP, Work((2.0**20,), 0.0, False), 4, chip)
    assert took == pytest.approx(chip.empty + 128 * chip.l2_cycles / chip.clock, rel=0.05)


def test_many_blocks_are_bound_by_the_memory():
    moved = 2.0**30
    took = gpu_model.seconds(Launch("k", (1 << 17, 1, 1), 256, 0), ONE_LOOP, Work((moved,), 0.0, True), 4, H100)
    assert moved / H100.copy < took < 1.3 * moved / H100.copy


def test_shared_memory_and_registers_bound_the_blocks():
    assert gpu_model.resident(Launch("k", (1, 1, 1), 256, 0), Facts(33, 0, 0, 0, 0), H100) == 6
    assert gpu_model.resident(Launch("k", (1, 1, 1), 256, 48 << 10), Facts(32, 0, 0, 0, 0), A100) == 3


def test_the_page_is_made_of_the_code_as_it_is(capsys):
    """By the hash of csrc/: no compiler takes part, so that this runs everywhere."""
    assert gpu_model.check() == 0, capsys.readouterr().out


def test_every_case_is_predicted_on_every_chip_and_called_a_prediction():
    rows = gpu_model.predictions()
    assert len(rows) == 3 * len(cases("cuda"))
    assert all(0 < row["predicted_of_copy"] < 1 and row["predicted_over_empty"] > 1 for row in rows)
    assert "Predictions, not measurements" in gpu_model.PAGE.read_text()


def test_a_change_of_the_sources_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(gpu_model, "digest", lambda: "another")
    assert gpu_model.main([]) == 1
    assert "has changed" in capsys.readouterr().out


def test_a_new_case_is_noticed(monkeypatch, capsys):
    case = Case("weighted_reduce", "mean", (5, 8, 9), torch.float32, "first")
    monkeypatch.setattr(gpu_model, "cases", lambda device: [case])
    assert gpu_model.main([]) == 1
    assert f"no launches of {case.name!r}" in capsys.readouterr().out


def test_without_nvcc_nothing_is_called_made(monkeypatch, capsys):
    monkeypatch.setattr(gpu_model.shutil, "which", lambda name: None)
    assert gpu_model.main(["--write"]) == 2
    assert "NOT made" in capsys.readouterr().out


def test_measurements_are_joined_by_case():
    name = "mean 64x2048x49 float32 first"
    row = {"case": name, "seconds": {"cuda": 1.0, "eager": 2.0}, "of_copy": {"cuda": 0.5}}
    other = {"case": name, "seconds": {"triton": 1.0}, "of_copy": {}}
    measured = {"conditions": {"device": "NVIDIA H100 80GB HBM3"}, "results": [row, other]}
    [joined] = gpu_model.compare(measured)
    assert joined["chip"] == "H100 SXM" and joined["case"] == name
    assert joined["measured_over_predicted"] == pytest.approx(1.0 / joined["predicted_total"])
    with pytest.raises(SystemExit, match="no predictions for 'NVIDIA T4'"):
        gpu_model.compare({"conditions": {"device": "NVIDIA T4"}, "results": []})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_the_committed_launches_are_those_of_the_launchers():
    """And those that can be worked out by hand: 2048 channels x 49 positions in float32."""
    _, _, committed = gpu_model.load()
    with launchers() as found:
        assert {case.name: found.of(case) for case in cases("cuda")} == committed
        case = Case("weighted_reduce", "mean", (256, 2048, 49), torch.float32, "first")
        # Tiles of 4096 elements are 83 channels, 80 in whole eights: 26 chunks; two tiles, 80 alphas and 256 sums.
        assert found.of(case)[0][0] == Launch("dense_kernel<float, 0>", (26, 256, 1), 256, (2 * 80 * 49 + 80 + 256) * 4)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None or gpu_facts.disassembler() is None, reason="needs nvcc and nvdisasm")
def test_the_committed_facts_are_those_of_the_compiled_code():
    content, facts, _ = gpu_model.load()
    nvcc = shutil.which("nvcc")
    if gpu_model.release(nvcc) != content["nvcc"]:
        pytest.skip(f"the facts are of nvcc {content['nvcc']}")
    measured = gpu_facts.collect(nvcc, gpu_facts.disassembler())
    assert {kernel: measured[kernel] for kernel in facts} == facts


EMULATOR = os.environ.get("SHAPLEYCAM_CUDA_ON_CPU")


@pytest.mark.skipif(EMULATOR is None, reason="needs the emulator: make cuda-on-cpu")
@pytest.mark.parametrize("case", [case for case in cases("cuda") if case.bytes() < 40 << 20], ids=lambda case: case.name)
def test_cuda_launches_of_the_package_are_those_of_the_model(case):
    """The package's own calls, on tensors, ask the launchers for the same grids as the model's calls without tensors."""
    module = Launchers(Path(EMULATOR))
    tensors = case.tensors(torch.device("cpu"))
    module.dry(True)
    try:
        case.ours("cuda")(*tensors)
        seen = module.logged()
    finally:
        module.dry(False)
    _, _, committed = gpu_model.load()
    assert seen == [launch for group in committed[case.name] for launch in group]
