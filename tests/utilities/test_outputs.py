"""Where the logits are: found, named, flattened, and told from probabilities."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shapleycam import Explainer, InputError, ShapleyCamWarning
from shapleycam.evaluate.metrics.functional import measure
from shapleycam.shapley import Game
from shapleycam.utilities.named import UTILITIES, evaluate, get_utility
from shapleycam.utilities.outputs import are_probabilities, logits_of
from shapleycam.utilities.tasks import EmbeddingSimilarity, SegmentationScore

from ..helpers import Split, small_heads, toy

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HEADS = ["pool-linear", "flatten-mlp"]


class Returns(nn.Module):
    """A model whose logits come in some other form."""

    def __init__(self, inner, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x):
        return self.form(self.inner(x))


def model_of(head="pool-linear"):
    torch.manual_seed(1)
    target, rest = small_heads()[head]
    model = Split(target, rest).double().eval()
    with torch.no_grad():
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.mul_(4)
    return model


IMAGES = X[:, :, :4, :4].double()


def maps_of(form, head="pool-linear", method="shapleycam", utility="rest", targets=None, **options):
    model = Returns(model_of(head), form).eval()
    return Explainer(model, "inner.target", method, utility, **options)(IMAGES, targets, with_gap=method == "shapleycam")


def test_auto():
    z = torch.zeros(2, 3)
    other = torch.ones(2, 3)
    for outputs in (z, (z, other), [z, other], {"logits": z, "out": other}, {"out": z}, SimpleNamespace(logits=z)):
        assert logits_of(outputs) is z
    for outputs in ({"boxes": z}, [{"boxes": z}], SimpleNamespace(scores=z), None, ()):
        assert logits_of(outputs) is None


def test_named_places():
    z, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert logits_of((other, z), 1) is z and logits_of([z, other], -2) is z
    assert logits_of({"a": other, "b": z}, "b") is z
    assert logits_of(SimpleNamespace(logits=other, scores=z), "scores") is z
    assert logits_of({"logits": z}, "logits") is z
    assert logits_of((other, z), lambda o: o[1]) is z


@pytest.mark.parametrize(
    ("outputs", "output", "match"),
    [
        ((torch.zeros(2, 3),), 1, "output=1 .*a tuple of 1: Tensor"),
        (torch.zeros(2, 3), 0, r"output=0 .*one tensor \[N, 3\]"),
        (torch.zeros(2, 3), "logits", "output='logits' .*one tensor"),
        ({"a": torch.zeros(2, 3)}, "b", "a mapping with 'a'"),
        ({"a": 3}, "a", "gave int"),
        ((1, 2), lambda o: o, "gave tuple"),
    ],
)
def test_there_must_be_a_tensor_at_the_place(outputs, output, match):
    with pytest.raises(InputError, match=match):
        logits_of(outputs, output)


@pytest.mark.parametrize("output", [True, 1.5, None, dict, ["logits"]])
def test_what_can_name_a_place(output):
    with pytest.raises(InputError, match="output must be 'auto'"):
        Explainer(toy(), output=output)


FORMS = [
    (lambda z: (z.softmax(1), z), 1),
    (lambda z: [z.softmax(1), z], -1),
    (lambda z: {"logits": z.softmax(1), "raw": z}, "raw"),
    (lambda z: (z * 0.5, z * 2), lambda outputs: outputs[1] / 2),
    (lambda z: z * 2, lambda outputs: outputs / 2),
]


@pytest.mark.parametrize(("form", "output"), FORMS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["shapleycam", "hirescam", "scorecam", "ablationcam"])
def test_the_maps_are_those_of_the_logits(form, output, head, method):
    expected = maps_of(lambda z: z, head, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShapleyCamWarning)
        result = maps_of(form, head, method, output=output)
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.logits, expected.logits)
    torch.testing.assert_close(result.probabilities, expected.probabilities)
    assert torch.equal(result.targets, expected.targets)
    if method == "shapleycam":
        torch.testing.assert_close(result.gap, expected.gap)


@pytest.mark.parametrize("engine", ["reverse_over_reverse", "forward_over_reverse", "midpoint"])
def test_every_engine_reads_the_same_place(engine):
    expected = maps_of(lambda z: z, "flatten-mlp", engine=engine)
    result = maps_of(lambda z: (z.softmax(1), z), "flatten-mlp", engine=engine, output=1)
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.logits, expected.logits)


def test_several_methods_the_automatic_layer_and_the_uses():
    plain, pair = model_of("conv-bn-silu"), Returns(model_of("conv-bn-silu"), lambda z: (z.softmax(1), z)).eval()
    expected = Explainer(plain).compare(IMAGES)
    explainer = Explainer(pair, output=1)
    result = explainer.compare(IMAGES)
    for name in expected:
        torch.testing.assert_close(result[name].raw, expected[name].raw, rtol=1e-9, atol=1e-12)
    games = [Game(e, IMAGES, 1, cells=2).exact() for e in (Explainer(plain), explainer)]
    torch.testing.assert_close(games[0].values, games[1].values)
    measured = [measure(e, IMAGES, 1, ["gradcam"])["gradcam"] for e in (Explainer(plain), explainer)]
    for one, other in zip(measured[0].tensors, measured[1].tensors, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [lambda z: {"logits": z, "more": z.exp()}, lambda z: (z, z.exp())], ids=["dict", "tuple"])
@pytest.mark.parametrize("method", ["shapleycam", "ablationcam"])
def test_an_own_utility_is_given_the_outputs_and_no_less(form, method):
    """Over a pool-and-linear head too, whose closed form knows the logits only."""
    of = lambda outputs: outputs["more"] if isinstance(outputs, dict) else outputs[1]
    result = maps_of(form, method=method, utility=lambda outputs, c: of(outputs).gather(1, c[:, None])[:, 0].tanh())
    expected = maps_of(lambda z: z.exp(), method=method, utility=lambda z, c: z.gather(1, c[:, None])[:, 0].tanh())
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)
    plain = maps_of(lambda z: z, utility=lambda z, c: z.gather(1, c[:, None])[:, 0].tanh())
    assert plain.diagnostics.engine == "closed_form"


# ------------------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
def test_probabilities_are_known(dtype, classes):
    z = torch.randn(4, classes, generator=torch.Generator().manual_seed(classes)) * 4
    assert are_probabilities(z.softmax(1).to(dtype))
    assert not are_probabilities(z.to(dtype)) and not are_probabilities(z.sigmoid().to(dtype))
    assert not are_probabilities(torch.cat((z.softmax(1)[:3], z[3:])))  # one row of four


def test_what_are_no_probabilities():
    for logits in (None, torch.ones(2, 1), torch.zeros(2, 3), torch.full((2, 2, 2, 2), 0.5), torch.tensor([[0, 1], [1, 0]])):
        assert not are_probabilities(logits)
    assert not are_probabilities(torch.tensor([[float("nan"), 1.0]]))
    assert not are_probabilities(torch.tensor([[1.5, -0.5]]))


@pytest.mark.parametrize("method", ["shapleycam", "gradcam", "scorecam"])
@pytest.mark.parametrize("utility", ["rest", "probability", "log_probability"])
def test_probabilities_are_warned_of(utility, method):
    with pytest.warns(ShapleyCamWarning, match=rf"returns probabilities.*'{utility}'.*output=lambda p: p\.log\(\)"):
        maps_of(lambda z: z.softmax(1), method=method, utility=utility)


@pytest.mark.parametrize(
    ("form", "place"),
    [
        (lambda z: (z.softmax(1), z), "1"),
        (lambda z: (z.softmax(1), [z], z.softmax(1), z), "3"),
        (lambda z: {"logits": z.softmax(1), "raw": z}, "'raw'"),
    ],
)
def test_the_warning_says_where_the_logits_are(form, place):
    with pytest.warns(ShapleyCamWarning, match=f"use output={place}"):
        result = maps_of(form)
    assert any("returns probabilities" in note for note in result.diagnostics.notes)


def test_the_warning_is_right_and_its_advice_too():
    expected = maps_of(lambda z: z, utility="log_probability", targets=1)
    with pytest.warns(ShapleyCamWarning):
        wrong = maps_of(lambda z: z.softmax(1), utility="log_probability", targets=1)
    assert (wrong.raw - expected.raw).norm() > 0.5 * expected.raw.norm()
    # ln p of ln p is ln p: the constant per image that is lost does not enter it.
    right = maps_of(lambda z: z.softmax(1), utility="log_probability", targets=1, output=lambda p: p.log())
    torch.testing.assert_close(right.raw, expected.raw, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{"utility": "logit"}, {"utility": lambda p, c: p.gather(1, c[:, None])[:, 0]}, {"output": lambda z: z}],
    ids=["logit", "own", "said"],
)
def test_who_wants_probabilities_is_not_warned(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShapleyCamWarning)
        maps_of(lambda z: z.softmax(1), "flatten-mlp", **options)


# ------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("ones", [1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["shapleycam", "ablationcam"])
def test_logits_of_a_classifier_that_ends_in_a_convolution(ones, head, method):
    expected = maps_of(lambda z: z, head, method, targets=range(5))
    result = maps_of(lambda z: z[(..., *[None] * ones)], head, method, targets=range(5))
    assert result.logits.shape == (5, 5) and result.outputs.ndim == 2 + ones
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)
    assert torch.equal(maps_of(lambda z: z[..., None, None], head, method).targets, maps_of(lambda z: z, head, method).targets)


@pytest.mark.filterwarnings("ignore:.*the map is all zeros:shapleycam.ShapleyCamWarning")
def test_a_segmentation_of_one_pixel_keeps_its_shape_and_its_category():
    form = lambda z: z[..., None, None]
    result = maps_of(form, "flatten-mlp", utility=SegmentationScore(category=3))
    assert result.logits.shape == (5, 5, 1, 1) and result.targets is None
    mask = torch.ones(1, 1)
    masked = maps_of(form, "flatten-mlp", utility=SegmentationScore(3, mask))
    expected = maps_of(lambda z: z, "flatten-mlp", targets=3)
    torch.testing.assert_close(masked.raw, expected.raw, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*the map is all zeros:shapleycam.ShapleyCamWarning")
def test_utilities_that_read_the_logits_follow_output():
    concept = torch.arange(1.0, 6.0, dtype=torch.float64)
    expected = maps_of(lambda z: z, utility=EmbeddingSimilarity(concept))
    result = maps_of(lambda z: (z.exp(), z), utility=EmbeddingSimilarity(concept), output=1)
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)
    grids = lambda z: z[..., None, None] * torch.ones(2, 2, dtype=z.dtype)
    score = SegmentationScore(3)
    expected = maps_of(grids, "flatten-mlp", utility=score)
    result = maps_of(lambda z: (grids(z.exp()), grids(z)), "flatten-mlp", utility=score, output=1)
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-9, atol=1e-12)


def test_messages_speak_of_the_users_batch():
    model = Returns(toy(), lambda z: z[..., None, None].expand(-1, -1, 2, 2)).eval()
    with pytest.raises(InputError, match=r"returned a tensor \[N, 5, 2, 2\]"):
        Explainer(model)(X)
    with pytest.raises(InputError, match=r"one floating value per image, \[N\]"):
        evaluate(get_utility(lambda z, c: z), X, None, None, 5)


def test_the_place_does_not_make_a_row_another_one():
    assert dataclasses.replace(UTILITIES["rest"], output=1).fused
