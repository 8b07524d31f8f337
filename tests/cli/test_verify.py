"""``shapleycam verify``: a table and an exit status."""

import pytest

pytest.importorskip("typer")

from shapleycam import ops
from shapleycam.cli.app import run
from shapleycam.ops.backends import LADDER, Backend


class Wrong(Backend):
    """One operator, with ones for every result."""

    name = "wrong"

    def status(self):
        return ops.BackendStatus(True, "wrong on purpose", ("cpu",), ("weighted_reduce",))

    def weighted_reduce(self, activations, gradient, hvp, pooling, out):
        out.fill_(1)


@pytest.mark.slow
def test_our_kernels_pass(capsys):
    assert run(["verify", "--quick", "--device", "cpu", "--backend", "native"]) == 0
    said = capsys.readouterr().out
    for operator in (
        "weighted_reduce plusplus",
        "channel_weighted_sum",
        "utility_rows",
        "quadrature_rows",
        "class_maps",
        "display_map",
        "overlay",
    ):
        assert said.count(operator) == 4  # dtypes
    assert "worst error" in said and "µs" in said and "all is well" in said


@pytest.mark.slow
def test_a_wrong_kernel_is_status_1(capsys):
    with LADDER.holding(Wrong()):
        assert run(["verify", "--quick", "--device", "cpu", "--backend", "wrong"]) == 1
    said = capsys.readouterr().out
    assert "24 of 24 rows are wrong" in said and "'wrong' computed weighted_reduce wrong" in said and "times" in said


def test_a_backend_that_is_not_here_is_status_2(capsys):
    assert run(["verify", "--backend", "tpu"]) == 2
    assert "'tpu' is no backend" in capsys.readouterr().err
