"""Programs by CUDA graphs, and through torch.compile, on a CUDA device: nobody has run these yet."""

import threading

import pytest
import torch

from shapleycam import Explainer

from .test_explainer_gpu import BOUND, DEVICE, PAIRS, error, expected, made

pytestmark = pytest.mark.gpu
HEADS = [(head, engine) for head, engine in PAIRS if engine in ("closed_form", "reverse_over_reverse", "quadrature")]


@pytest.mark.parametrize(("head", "engine"), HEADS)
def test_graphs_agree_with_the_cpu_in_float64(head, engine):
    model, images = made(head, batch=7)
    exact = expected(model, images, None, engine)
    captured = Explainer(model.to(DEVICE), "target", engine=engine).capture(images[:2].to(DEVICE))
    for count in (4, 3, 1, 7, 4):
        found = captured(images[:count].to(DEVICE))
        assert captured.reason is None
        assert error(found.raw, exact[:count]) < BOUND[torch.float32]
    assert captured.sizes == (1, 4, 8)


def test_streams_and_threads():
    model, images = made("conv-bn-silu", batch=8)
    images = images.to(DEVICE)
    captured = Explainer(model.to(DEVICE), "target").capture(images[:2])
    plain = captured.program(images).raw
    wrong = []

    def work(first):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                found = captured(images[first : first + 4])
                torch.cuda._sleep(10000)
                if not torch.allclose(found.raw, plain[first : first + 4], rtol=1e-3, atol=1e-5):
                    wrong.append(first)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert wrong == []


def test_weights_are_followed():
    model, images = made("conv-bn-silu")
    model, images = model.to(DEVICE), images.to(DEVICE)
    captured = Explainer(model, "target").capture(images)
    before = captured(images).raw
    with torch.no_grad():
        model.head[0].weight.mul_(-1)
    after = captured(images).raw
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, captured.program(images).raw, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("head", "engine"), HEADS[:2])
def test_compiled(head, engine):
    model, images = made(head)
    exact = expected(model, images, None, engine)
    compiled = Explainer(model.to(DEVICE), "target", engine=engine).compile(images.to(DEVICE), report=True)
    assert error(compiled(images.to(DEVICE)).raw, exact) < BOUND[torch.float32]
