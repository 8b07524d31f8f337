"""The table of what the CUDA kernels take, and how it is read and compared (make resources compiles and compares)."""

import re

import pytest
from bench import resources
from bench.resources import Usage

LOG = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 27 registers, used 0 barriers, 392 bytes cmem[0]
ptxas info    : Compile time = 5.1 ms
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 8192 bytes smem, 504 bytes cmem[0]
"""
PLAIN, SPILLING = Usage("_Z1av", "sm_80", 27, 0, 0, 0, 0), Usage("_Z1bv", "sm_90", 64, 24, 20, 16, 8192)


def test_the_assemblers_report_is_read():
    assert resources.parse(LOG) == [PLAIN, SPILLING]


def test_a_report_that_is_not_understood_raises():
    with pytest.raises(ValueError, match="not understood"):
        resources.parse(LOG.replace("Used 64 registers", "Uses 64 registers"))


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"), [(27, 0, 8), (32, 0, 8), (33, 0, 6), (64, 8192, 4), (255, 0, 1), (27, 49152, 3)]
)
def test_blocks_of_a_multiprocessor(registers, shared, blocks):
    # 65536 registers, in steps of 8 to a thread, among blocks of 256 threads; 164 KiB, of which each block takes 1 KiB more.
    assert Usage("k", "sm_80", registers, 0, 0, 0, shared).blocks == blocks


def test_a_spill_is_a_difference():
    committed = resources.render([PLAIN, SPILLING], "13.0.88")
    assert resources.compare(committed, committed) == []
    spilled = resources.render([Usage("_Z1av", "sm_80", 27, 8, 4, 4, 0), SPILLING], "13.0.88")
    assert resources.compare(committed, spilled) == [
        "-| `_Z1av` | sm_80 | 27 | 0 | 0 | 0 | 0 | 8 |",
        "+| `_Z1av` | sm_80 | 27 | 8 | 4 | 4 | 0 | 8 |",
    ]
    assert resources.compare(committed, resources.render([PLAIN], "13.0.88"))


def test_without_nvcc_nothing_is_called_compared(monkeypatch, capsys):
    monkeypatch.setattr(resources.shutil, "which", lambda name: None)
    assert resources.main([]) == 2
    assert "NOT compared" in capsys.readouterr().out


def test_another_nvcc_is_not_compared(monkeypatch, capsys):
    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(resources, "release", lambda nvcc: "99.0.0")
    monkeypatch.setattr(resources, "measure", lambda nvcc: pytest.fail("nothing to compare with"))
    assert resources.main([]) == 2
    assert "99.0.0: NOT compared" in capsys.readouterr().out


def test_the_committed_table_has_every_kernel_on_both_chips():
    rows = re.findall(r"^\| `(.+)` \| (sm_\d+) \|", resources.TABLE.read_text(), re.MULTILINE)
    by_chip = {chip: {kernel for kernel, on in rows if on == chip} for chip in resources.CHIPS}
    assert by_chip["sm_80"] == by_chip["sm_90"]
    # reduce 7 rows x 9 dtypes of the packed kernels and 6 x 4 general ones, 4 sums and 2 adds; display 13; head 6.
    assert len(by_chip["sm_80"]) == 7 * 9 + 6 * 4 + 4 + 2 + 13 + 6
    assert len(rows) == 2 * len(by_chip["sm_80"])
