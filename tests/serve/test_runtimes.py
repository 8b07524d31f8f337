"""What runs the model: the same answers from the explainer and from ONNX Runtime, and what each of them refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from shapleycam import Explainer, ShapleyCamError, ShapleyCamWarning
from shapleycam.export import export
from shapleycam.images import Preprocess
from shapleycam.ops.backends import LADDER
from shapleycam.serve import ExplainerRuntime, OnnxRuntime, ProgramRuntime, Question, Runtime, Service, Stopped
from shapleycam.serve.config import ModelConfig
from shapleycam.serve.onnx_sessions import open_session
from shapleycam.serve.run import load_runtime
from shapleycam.serve.triton import write_repository

from ..ops.test_checking import Spoiled
from .tiny import CLASSES, PREPROCESS, SIDE, classifier, encoded, known, live, pixels


class Bare(nn.Module):
    """The tiny network without the tests' own behaviour, which no file can hold."""

    def __init__(self) -> None:
        super().__init__()
        found = classifier().model
        self.features, self.pool, self.head = found.features, found.pool, found.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))


def write(file: Path, targets: str, outputs: list[str], size: str = "image") -> str:
    images = torch.stack([PREPROCESS.normalise(pixels(seed)) for seed in (0, 1)])
    program = Explainer(Bare().eval()).program(images, targets=targets, size=size)
    given = (images, torch.tensor([-1, -1])) if targets == "given" else (images,)
    shapes = ({0: torch.export.Dim("n", min=1)},) * len(given)
    exported = torch.export.export(program, given, dynamic_shapes=shapes)
    names = ["image", "target"][: len(given)]
    torch.onnx.export(exported, f=str(file), dynamo=True, external_data=False, input_names=names, output_names=outputs)
    return str(file)


ALL = ["prediction", "target_class", "raw_map", "saliency_map"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("onnx") / "given.onnx", "given", ALL)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def given(file: str, request: Any) -> OnnxRuntime:
    return OnnxRuntime(file, PREPROCESS, classifier().classes, engine=request.param, threads=1)


def test_both_are_runtimes(given: OnnxRuntime) -> None:
    assert isinstance(given, Runtime) and isinstance(ExplainerRuntime(classifier()), Runtime)
    assert given.count == CLASSES and given.methods == ("shapleycam",)


@pytest.mark.parametrize(
    "question",
    [Question(), Question(topk=3), Question(targets=(4,)), Question(targets=(5, 0, 2)), Question(explain=False)],
    ids=str,
)
def test_the_same_answers_from_a_file(given: OnnxRuntime, question: Question) -> None:
    images = [encoded(pixels(seed)) for seed in range(5)]
    with Service(given, max_batch=4) as file, Service(ExplainerRuntime(classifier()), max_batch=4) as eager:
        pairs = [[future.result(20) for future in one.submit(images, question)] for one in (file, eager)]
    for from_file, from_explainer in zip(*pairs, strict=True):
        assert torch.allclose(from_file.logits, from_explainer.logits, rtol=1e-4, atol=1e-4)
        if question.explain:
            assert from_file.targets == from_explainer.targets
            assert torch.allclose(from_file.raw, from_explainer.raw, rtol=1e-3, atol=1e-4)
            assert torch.allclose(from_file.heatmaps(), from_explainer.heatmaps(), atol=1e-3)
            assert (from_file.overlay().int() - from_explainer.overlay().int()).abs().max() <= 3


@pytest.mark.slow
def test_a_program_without_raw_maps_serves_heatmaps(tmp_path: Path) -> None:
    file = write(tmp_path / "shown.onnx", "predicted", ["prediction", "target_class", "unread", "saliency_map"], "layer")
    with live(OnnxRuntime(file, PREPROCESS), told=ModelConfig(max_batch=2)) as found:
        one = known(2)
        url = f"{found.url}/v1/explain"
        answer = httpx.post(f"{url}?return=npy", content=one.data, verify=False)
        maps = numpy.load(io.BytesIO(answer.content))
        expected = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None]).heatmaps()
        assert maps.shape == (1, SIDE, SIDE) and numpy.abs(maps - expected.numpy()).max() < 0.02  # resized twice
        for query, words in (
            ("return=raw", "without signed maps"),
            ("target=1", "predicted class only"),
            ("gap=true&return=json", "no completeness gap"),
            ("method=gradcam", "not served"),
        ):
            refused = httpx.post(f"{url}?{query}", content=one.data, verify=False)
            assert refused.status_code == 422 and words in refused.text
        assert httpx.post(url, content=one.data, verify=False).status_code == 200


@pytest.mark.parametrize("way", ["program", "captured", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_same_answers_from_a_program(way: str) -> None:
    bare = dataclasses.replace(classifier(), model=Bare().eval())
    images = [encoded(pixels(seed)) for seed in range(5)]
    questions = [Question(), Question(topk=3), Question(targets=(4,)), Question(targets=(5, 0, 2)), Question(explain=False)]
    runtime = ProgramRuntime(bare, way)
    assert isinstance(runtime, Runtime)
    with Service(runtime, max_batch=4) as program, Service(ExplainerRuntime(bare), max_batch=4) as eager:
        for question in questions:
            pairs = [[future.result(120) for future in one.submit(images, question)] for one in (program, eager)]
            for mine, expected in zip(*pairs, strict=True):
                assert torch.allclose(mine.logits, expected.logits, rtol=1e-4, atol=1e-4)
                if question.explain:
                    assert mine.targets == expected.targets and mine.made["engine"] == expected.made["engine"]
                    assert torch.allclose(mine.raw, expected.raw, rtol=1e-3, atol=1e-4)
        with pytest.raises(ShapleyCamError, match="no completeness gap"):
            program.explain(images[0], Question(gap=True))
        with pytest.raises(ShapleyCamError, match="not served"):
            program.explain(images[0], Question(method="gradcam"))
    with pytest.raises(ShapleyCamError, match="one of program"):
        ProgramRuntime(bare, "fast")


def test_names_of_a_file_are_its_own_in_openvino(tmp_path: Path) -> None:
    """Behind an Identity a port has two names, and either may come first."""
    pytest.importorskip("openvino")
    value = helper.make_tensor_value_info
    for before, after in (("a", "z"), ("z", "a")):
        nodes = [helper.make_node("Abs", ["image"], [before]), helper.make_node("Identity", [before], [after])]
        ports = [[value(name, TensorProto.FLOAT, [2])] for name in ("image", after)]
        model = helper.make_model(helper.make_graph(nodes, "g", *ports), opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 9
        onnx.save(model, tmp_path / "g.onnx")
        session = open_session(str(tmp_path / "g.onnx"), "openvino", None, 1)
        assert list(session.outputs) == [after] and session.outputs[after].name == after
        [found] = session.run([after], {"image": numpy.array([-1, 2], dtype=numpy.float32)})
        assert found.tolist() == [1, 2]


def test_a_file_of_another_kind_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no file")
    for engine, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        with pytest.raises(ShapleyCamError, match=f"cannot be run by {name}"):
            OnnxRuntime(str(tmp_path / "no.onnx"), PREPROCESS, engine=engine)
    with pytest.raises(ShapleyCamError, match="run by one of"):
        OnnxRuntime(file, PREPROCESS, engine="tensorrt")
    other = onnx.load(file)
    del other.graph.output[0]
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ShapleyCamError, match="expected 'image'"):
        OnnxRuntime(str(tmp_path / "other.onnx"), PREPROCESS)
    with pytest.raises(ShapleyCamError, match="prepares pictures itself"):
        OnnxRuntime(file, Preprocess((64, 64), 64))
    with pytest.raises(ShapleyCamError, match="does not say how pictures"):
        OnnxRuntime(file)
    for text, words in (("no json", "no JSON"), (json.dumps({"preprocess": {"colour": 3}}), "not known")):
        described = onnx.load(file)
        described.metadata_props.add(key="shapleycam", value=text)
        onnx.save(described, tmp_path / "described.onnx")
        with pytest.raises(ShapleyCamError, match=words):
            OnnxRuntime(str(tmp_path / "described.onnx"))


def test_a_file_that_describes_itself_needs_nothing_else(file: str, tmp_path: Path) -> None:
    described = onnx.load(file)
    about = {
        "preprocess": dataclasses.asdict(PREPROCESS),
        "classes": [f"thing {n}" for n in range(CLASSES)],
        "layer": ["features"],
        "method": "shapleycam",
        "utility": "rest",
        "engine": "closed_form",
        "maps": "image",
    }
    described.metadata_props.add(key="shapleycam", value=json.dumps(about))
    onnx.save(described, tmp_path / "described.onnx")
    runtime = load_runtime(ModelConfig(runtime="onnx", file=str(tmp_path / "described.onnx")))
    with Service(runtime, max_batch=1) as service:
        answer = service.explain(known(0).data)
    assert answer.made == {
        "method": "shapleycam", "utility": "rest", "engine": "closed_form", "backend": "onnxruntime", "layer": "features"
    }  # fmt: skip
    assert runtime.classes[3] == ("thing 3",) and torch.allclose(answer.raw[0], known(0).raw, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dynamic_size", [False, True])
def test_an_exported_artefact_is_served_as_it_is(tmp_path: Path, dynamic_size: bool) -> None:
    """What `shapleycam export` writes, with its own description, and the same answers from it."""
    path, names = tmp_path / "artefact.onnx", [f"thing {n}" for n in range(CLASSES)]
    images = torch.randn(2, 3, SIDE, SIDE)
    export(
        Explainer(Bare().eval()),
        images,
        path,
        targets="given",
        outputs=("prediction", "saliency_map", "raw_map"),
        preprocess=PREPROCESS,
        classes=names,
        dynamic_size=dynamic_size,
    )
    runtime = load_runtime(ModelConfig(runtime="onnx", file=str(path)))
    with Service(runtime, max_batch=2) as service:
        for n in range(3):
            answer = service.explain(known(n).data)
            assert torch.allclose(answer.raw[0], known(n).raw, rtol=1e-3, atol=1e-4)
    assert answer.made["backend"] == "onnxruntime" and runtime.classes[3] == ("thing 3",)


def test_a_runtime_of_ones_own() -> None:
    class Mine(ExplainerRuntime):
        device = "somewhere"

    with Service(Mine(classifier(), methods=["gradcam", "scorecam"], utilities=["logit"]), max_batch=2) as service:
        answer = service.explain(encoded(pixels(0)))
        assert answer.made["method"] == "gradcam" and answer.made["utility"] == "logit"
        assert service.explain(encoded(pixels(0)), Question(method="scorecam")).made["method"] == "scorecam"
        with pytest.raises(ShapleyCamError, match="not served"):
            service.explain(encoded(pixels(0)), Question(method="shapleycam"))


def test_mistakes_of_the_one_who_serves() -> None:
    with pytest.raises(ShapleyCamError, match="one target layer"):
        ExplainerRuntime(classifier(), layer=["features.0", "features.2"])
    with pytest.raises(ShapleyCamError, match="Unknown method"):
        ExplainerRuntime(classifier(), methods=["nonsense"])
    with pytest.raises(ShapleyCamError, match="formats"):
        Service(ExplainerRuntime(classifier()), formats=["GIF"])
    with pytest.raises(ShapleyCamError, match="positive"):
        Service(ExplainerRuntime(classifier()), timeout=0)
    with pytest.raises(ShapleyCamError, match="no layer|layer"):
        Service(ExplainerRuntime(classifier(), layer="nonsense"), max_batch=1).start()


def test_the_service_measures_its_batch_and_the_model_is_left_as_it_was() -> None:
    found = classifier()
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    with Service(ExplainerRuntime(found)) as service:
        assert service.max_batch in service.tuning and service.count == CLASSES
        service.explain(encoded(pixels(0)), Question(engine="reverse_over_reverse"))
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in found.model.parameters()) and not found.model.training
    assert not any(module._forward_hooks for module in found.model.modules())


def test_tensors_are_taken_and_wrong_ones_refused() -> None:
    one = known(1)
    with Service(ExplainerRuntime(classifier()), max_batch=2) as service:
        for image in (one.view, PREPROCESS.normalise(one.view), PREPROCESS.normalise(one.view).double()):
            assert torch.allclose(service.explain(image).raw[0], one.raw, rtol=1e-4, atol=1e-6)
        for wrong in (one.view[None], one.view.int(), torch.zeros(3, 8, 8)):
            with pytest.raises(ShapleyCamError, match="image tensor must be"):
                service.explain(wrong)
        with pytest.raises(ShapleyCamError, match="no picture to draw on"):
            service.explain(PREPROCESS.normalise(one.view)).overlay()
        with pytest.raises(ShapleyCamError, match="at least one image"):
            service.submit([])


def fixed(file: Path, count: int, target: bool) -> tuple[str, numpy.ndarray]:
    """A program of so many rows at a time: a map per class, or of the target; the prediction is each map's mean."""
    weights = numpy.random.default_rng(0).normal(size=(CLASSES, 3, 1, 1)).astype("f4")
    maps = "maps" if target else "raw"
    nodes = [
        helper.make_node("Conv", ["image", "weights"], [maps]),
        helper.make_node("ReduceMean", [maps], ["prediction"], axes=[2, 3], keepdims=0),
    ]
    shapes = {"prediction": [count, CLASSES], "raw": [count, CLASSES, SIDE, SIDE]}
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [count, 3, SIDE, SIDE])]
    if target:
        nodes.append(helper.make_node("Unsqueeze", ["target", "one"], ["column"]))
        nodes.append(helper.make_node("GatherND", ["maps", "column"], ["raw"], batch_dims=1))
        inputs.append(helper.make_tensor_value_info("target", TensorProto.INT64, [count]))
        shapes["raw"] = [count, SIDE, SIDE]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    given = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(numpy.array([1]), "one")]
    graph = helper.make_graph(nodes, "fixed", inputs, outputs, given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, file)
    return str(file), weights[:, :, 0, 0]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("count", "target"), [(1, False), (4, False), (1, True), (4, True)])
def test_a_file_of_so_many_rows_is_filled_up(tmp_path: Path, engine: str, count: int, target: bool) -> None:
    file, weights = fixed(tmp_path / "fixed.onnx", count, target)
    images = [PREPROCESS.normalise(pixels(seed)) for seed in range(6)]
    with Service(OnnxRuntime(file, PREPROCESS, engine=engine), max_batch=6) as service:
        question = Question(targets=(3, 1))
        answers = [future.result(20) for future in service.submit(images, question)]
    for image, answer in zip(images, answers, strict=True):
        maps = numpy.einsum("kc,chw->khw", weights.astype(float), image.numpy().astype(float))
        assert numpy.allclose(answer.logits, maps.mean((1, 2)), atol=1e-4)
        assert numpy.allclose(answer.raw, maps[[3, 1]], atol=1e-4)


@pytest.mark.parametrize("devices", [0, 2])
def test_a_repository_for_triton_is_what_triton_reads(file: str, tmp_path: Path, devices: int) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = write_repository(file, tmp_path, "cams", max_batch=16, devices=devices)
    told = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())  # Triton's own definition
    assert (told.name, told.platform, told.max_batch_size) == ("cams", "onnxruntime_onnx", 16)
    inputs = {one.name: (one.data_type, list(one.dims), one.HasField("reshape")) for one in told.input}
    assert inputs["image"] == (model_config_pb2.TYPE_FP32, [3, SIDE, SIDE], False)
    assert inputs["target"] == (model_config_pb2.TYPE_INT64, [1], True)
    outputs = {one.name: list(one.dims) for one in told.output}
    assert outputs == {"prediction": [CLASSES], "target_class": [1], "raw_map": [8, 8], "saliency_map": [SIDE, SIDE]}
    assert told.HasField("dynamic_batching") and list(told.instance_group[0].gpus) == list(range(devices))
    assert (tmp_path / "cams" / "1" / "model.onnx").read_bytes() == Path(file).read_bytes()
    with pytest.raises(ShapleyCamError, match="there already"):
        write_repository(file, tmp_path, "cams")


def test_a_wrong_kernel_is_replaced_counted_and_told() -> None:
    one = known(1)
    spoiled = Spoiled(lambda x: x + 0.5)
    with LADDER.holding(spoiled), pytest.warns(ShapleyCamWarning, match="serves .* no more"):
        with live(ExplainerRuntime(classifier(), check=1.0)) as found:
            answer = httpx.post(f"{found.url}/v1/explain?return=raw", content=one.data, verify=False)
            assert numpy.allclose(numpy.load(io.BytesIO(answer.content)), one.raw[None], rtol=1e-4, atol=1e-6)
            told = httpx.get(f"{found.url}/metrics", verify=False).text
            count = float(re.search(r'shapleycam_kernel_mismatches\{model="tiny"\} (\S+)', told)[1])
            assert count == found.server.services["tiny"].runtime.mismatches >= 1
    with LADDER.holding(Spoiled(lambda x: x + 0.5)):
        runtime = ExplainerRuntime(classifier(), check=1.0, on_mismatch="raise")
        with pytest.raises(Stopped, match="computed .* wrong"):
            Service(runtime, max_batch=1).start()  # warming up finds it
        assert runtime.mismatches == 1


def test_stopping_in_a_hurry_leaves_nobody_waiting() -> None:
    found = classifier()
    with Service(ExplainerRuntime(found), max_batch=1, decoders=1) as service:
        found.model.open.clear()
        held, gate = threading.Event(), threading.Event()
        service.pool.submit(lambda: (held.set(), gate.wait(20)))  # the decoder is busy
        assert held.wait(10)
        futures = service.submit([known(0).data] * 3)
        stopped = threading.Thread(target=service.stop, args=(0.05,))
        stopped.start()
        stopped.join(20)
        gate.set()
        for future in futures:
            with pytest.raises(Stopped):
                future.result(10)
        assert service.held == 0
        found.model.open.set()
