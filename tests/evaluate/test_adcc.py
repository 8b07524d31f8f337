"""The ADCC evaluation against a plain per-image loop in numpy, literal numbers, and broken input."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")

from shapleycam import Explainer, InputError
from shapleycam.methods import PAPER_METHODS
from shapleycam.metrics import (
    ADCC,
    AverageDrop,
    AverageDropInDeletion,
    Coherency,
    Complexity,
    IncreaseInConfidence,
    adcc,
    coherency,
    complexity,
    drop,
    increase,
    measure,
)

from ..helpers import network

COLUMNS = ("AD", "Coh", "Com", "ADCC", "IC", "ADD")


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def authors_loop(model, images, method, layer="2"):
    """One image at a time, batch 1, numpy float64 from the maps on: the authors' evaluation, written again."""

    def explain(x, c=None):
        return Explainer(model, layer=layer, method=method)(x, c).heatmaps()[0].double().numpy()

    def chance(x, c):
        with torch.no_grad():
            return softmax(model(x)[0].double().numpy())[c]

    rows = []
    for n in range(len(images)):
        x = images[n : n + 1]
        with torch.no_grad():
            c = int(model(x)[0].argmax())
        m = explain(x)
        mask = torch.from_numpy(m)[None, None].to(x.dtype)
        p, kept, deleted = chance(x, c), chance(x * mask, c), chance(x * (1 - mask), c)
        again = explain(x * mask, c)
        with np.errstate(all="ignore"):
            y = np.corrcoef(m.reshape(-1), again.reshape(-1))[0, 1]
        coh = (y + 1) / 2 if np.isfinite(y) else 0.0
        rows.append((max(0.0, p - kept) / p, coh, np.abs(m).mean(), float(kept > p), max(0.0, p - deleted) / p))
    ad, coh, com, ic, add = np.mean(np.array(rows, np.float64), 0)
    return dict(zip(COLUMNS, (ad, coh, com, 3 / (1 / coh + 1 / (1 - com) + 1 / (1 - ad)), ic, add), strict=True))


@pytest.mark.parametrize("curved", [True, False])
def test_against_the_loop(images, curved):
    model, images = network(curved).double(), images.double()
    methods = [name for name in PAPER_METHODS if name != "randomcam"]
    tables = {name: ADCC() for name in methods}
    explainer = Explainer(model, layer="2")
    for batch in images.split(4):
        for name, measured in measure(explainer, batch, methods=methods).items():
            tables[name].update(*measured.tensors)
    rows = {name: {key: float(value) for key, value in table.compute().items()} for name, table in tables.items()}
    for name in methods:
        expected = authors_loop(model, images, name)
        assert rows[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), name
    # The test has something to say: the parts are neither all 0 nor all 1, and the methods differ.
    assert all(0 < rows["gradcam"][key] < 1 for key in ("AD", "Coh", "Com", "ADCC", "ADD"))
    assert rows["shapleycam"] != rows["gradcam"]


def test_literal_values():
    p, kept = torch.tensor([0.5, 0.4, 0.0, 0.8]), torch.tensor([0.25, 0.6, 0.1, 0.8])
    assert drop(p, kept).tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert increase(p, kept).tolist() == [0.0, 1.0, 1.0, 0.0]  # strict
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.25, 0.25], [0.25, 0.25]]])
    assert complexity(maps).tolist() == [0.5, 0.25]
    opposite = 1 - maps
    assert coherency(maps, maps).tolist() == pytest.approx([1.0, 0.0])
    assert coherency(maps, opposite).tolist() == pytest.approx([0.0, 0.0])
    # 3 / (1/0.8 + 1/0.6 + 1/0.5) = 3 / 4.91666…
    value = adcc(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8).double(), torch.tensor(0.4).double())
    assert float(value) == pytest.approx(0.6101694915254237, rel=1e-7)
    assert float(adcc(torch.tensor(1.0), torch.tensor(0.8), torch.tensor(0.4))) == 0.0


def test_pearson_is_that_of_numpy():
    a, b = torch.rand(5, 9, 7), torch.rand(5, 9, 7)
    expected = [(np.corrcoef(x.flatten(), y.flatten())[0, 1] + 1) / 2 for x, y in zip(a.double(), b.double(), strict=True)]
    assert coherency(a, b).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, math.nan, math.inf])
def test_a_constant_or_broken_map_has_coherency_0(value):
    a = torch.rand(1, 224, 224)
    b = torch.full_like(a, value)
    for pair in ((a, b), (b, a), (b, b)):
        assert coherency(*pair).tolist() == [0.0]
    c = a.clone()
    c[0, 3, 5] = value if not math.isfinite(value) else math.nan
    assert coherency(a, c).tolist() == [0.0]


@pytest.mark.filterwarnings("ignore:.*the map is all zeros:shapleycam.ShapleyCamWarning")
def test_dead_maps_give_a_row_without_nan(images):
    model = network()
    with torch.no_grad():
        model[-1].weight.zero_()  # every map is zero
    metric = ADCC()
    metric.update(*measure(Explainer(model, layer="2"), images, methods=["gradcam"])["gradcam"].tensors)
    row = metric.compute()
    assert float(row["Coh"]) == 0 and float(row["ADCC"]) == 0 and float(row["Com"]) == 0
    assert all(math.isfinite(float(value)) for value in row.values())


@pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")
def test_nan_images_are_counted_and_left_out(images, model):
    explainer = Explainer(model, layer="2")
    explainer.prepare(images)
    clean, mixed = ADCC(), ADCC()
    clean.update(*measure(explainer, images[[0, 2, 3, 4, 5]], methods=["shapleycam"])["shapleycam"].tensors)
    dirty = images.clone()
    dirty[1, 0, 0, 0] = math.nan
    mixed.update(*measure(explainer, dirty, methods=["shapleycam"])["shapleycam"].tensors)
    assert int(mixed.skipped) == 1 and int(mixed.images) == 5
    expected = {key: pytest.approx(float(value), rel=1e-5) for key, value in clean.compute().items()}
    assert {key: float(value) for key, value in mixed.compute().items()} == expected
    for metric in (AverageDrop(), AverageDropInDeletion(), IncreaseInConfidence()):
        metric.update(torch.tensor([0.5, math.nan, 0.5]), torch.tensor([0.4, 0.4, math.nan]))
        assert (int(metric.images), int(metric.skipped)) == (1, 2)


def random_tensors(n, seed):
    g = torch.Generator().manual_seed(seed)
    return (*(torch.rand(n, generator=g) for _ in range(3)), *(torch.rand(n, 5, 6, generator=g) for _ in range(2)))


def test_merged_states_are_one_pass_in_any_order():
    parts = [random_tensors(n, n) for n in (3, 1, 8, 5)]
    whole = ADCC()
    whole.update(*(torch.cat(column) for column in zip(*parts, strict=True)))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        one, two = ADCC(), ADCC()
        for i, k in enumerate(order):
            (one if i % 2 else two).update(*parts[k])
        one.merge_state(two)
        assert int(one.images) == 17
        for key, value in whole.compute().items():
            assert float(one.compute()[key]) == pytest.approx(float(value), rel=1e-14)


def one_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    table, apart = ADCC(), Coherency()
    for k in (0, 1, 2)[rank::2]:  # the second process has fewer images, and a broken one
        tensors = random_tensors(3 + k, k)
        if rank == 1:
            tensors[0][0] = float("nan")
        table.update(*tensors)
        apart.update(*tensors[3:])
    found = {key: value.item() for key, value in table.compute().items()}
    found["apart"] = apart.compute().item()
    # The counts of a process are its own again once the result is had.
    (folder / f"{rank}.json").write_text(json.dumps([found, int(table.images), int(table.skipped)]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch was built without gloo")
@pytest.mark.slow
def test_two_processes_share_one_table(tmp_path):
    # Forked from one process that has imported what takes seconds.
    torch.multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(one_process, (tmp_path,), nprocs=2, start_method="forkserver")
    whole, apart = ADCC(), Coherency()
    for k in range(3):
        tensors = random_tensors(3 + k, k)
        if k == 1:
            tensors[0][0] = float("nan")
        whole.update(*tensors)
        apart.update(*tensors[3:])
    expected = {key: value.item() for key, value in whole.compute().items()} | {"apart": apart.compute().item()}
    for rank, counts in enumerate(([8, 0], [3, 1])):
        found, *own = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-14) and own == counts


def test_single_metrics_are_the_columns_of_the_table():
    p, kept, deleted, maps, again = tensors = random_tensors(9, 1)
    table = ADCC()
    table.update(*tensors)
    row = table.compute()
    for metric, arguments, key in (
        (AverageDrop(), (p, kept), "AD"),
        (Coherency(), (maps, again), "Coh"),
        (Complexity(), (maps,), "Com"),
        (IncreaseInConfidence(), (p, kept), "IC"),
        (AverageDropInDeletion(), (p, deleted), "ADD"),
    ):
        metric.update(*arguments)
        assert metric.compute() == row[key] and metric.compute().dtype == torch.float64
        metric.reset()
        assert int(metric.images) == 0


def test_a_saved_state_is_the_same_to_the_last_digit():
    table, again = ADCC(), ADCC()
    table.update(*random_tensors(13, 2))
    again.restore(json.loads(json.dumps(table.save())))
    assert {k: v.item() for k, v in again.compute().items()} == {k: v.item() for k, v in table.compute().items()}
    again.update(*random_tensors(4, 3))
    table.update(*random_tensors(4, 3))
    assert again.save() == table.save()
    other = ADCC()
    other.load_state_dict(table.state_dict())
    assert other.save() == table.save()


def test_half_precision_models_are_near_the_float32_ones(images):
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        metric = ADCC()
        with torch.no_grad():
            classes = network()(images).argmax(1)
        metric.update(*measure(Explainer(model, layer="2"), images.to(dtype), classes, ["gradcam"])["gradcam"].tensors)
        rows.append({key: float(value) for key, value in metric.compute().items()})
        assert metric.totals.dtype == torch.float64
    for key in ("AD", "Coh", "Com", "ADCC", "ADD"):
        assert rows[1][key] == pytest.approx(rows[0][key], abs=0.05), key


def test_equal_maps_share_their_passes(images):
    model = network(curved=False)
    explainer = Explainer(model, layer="2")
    for name in ("shapleycam", "gradcam", "randomcam"):  # studies the model for derivatives of each order
        explainer.compare(images, methods=name)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    pair = measure(explainer, images, methods=["gradcam", "hirescam"])
    assert len(passes) == 3
    assert torch.equal(pair["gradcam"].again, pair["hirescam"].again)
    passes.clear()
    measure(explainer, images)
    # eleven methods; GradCAM = HiResCAM and ShapleyCAM = ShapleyCAM-H with this head
    assert len(passes) == 1 + 2 * 9


def test_refuses(images, model):
    with pytest.raises(InputError, match="one class per image"):
        measure(Explainer(model, layer="2"), images, torch.zeros(6, 2, dtype=torch.int64), ["gradcam"])
    with pytest.raises(InputError, match="one shape"):
        coherency(torch.rand(2, 3, 3), torch.rand(2, 3, 4))
