"""The page of the heads is the committed result of its study."""

import json

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from bench import agreement_heads

RESULT = json.loads(agreement_heads.RESULT.read_text())


def test_the_page_is_made_of_the_committed_result():
    assert agreement_heads.PAGE.read_text() == agreement_heads.page(RESULT)
    assert agreement_heads.PICTURE.is_file()


def test_from_the_mean_four_nodes_do_where_a_layer_norm_follows():
    for network in ("timm:swin_tiny_patch4_window7_224", "timm:convnext_atto"):
        errors = {row["baseline"]: sorted(row["K=4"]["error"])[1] for row in RESULT["heads"] if row["network"] == network}
        assert errors["mean"] < 0.1 < 0.5 < errors["zero"]
