"""What a server is told, and the mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shapleycam import ShapleyCamError
from shapleycam.cli.serve import configuration
from shapleycam.serve.config import Limits, ModelConfig, ServerConfig, read_config
from shapleycam.serve.run import load_runtime


def read(tmp_path: Path, text: str) -> ServerConfig:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    return read_config(file)


def test_an_empty_file_is_the_defaults_and_the_defaults_are_safe(tmp_path: Path) -> None:
    assert read(tmp_path, "") == ServerConfig()
    assert ServerConfig().host == "127.0.0.1" and ServerConfig().models == {"default": ModelConfig()}
    assert ServerConfig().limits == Limits() and Limits().formats == ("PNG", "JPEG", "WEBP")


def test_everything_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("  0123456789abcdef\n")
    (tmp_path / "pets.pth").touch()
    told = read(
        tmp_path,
        'host = "0.0.0.0"\nport = 80\ntoken_file = "secret"\npre_stop = 5\n[limits]\nbody = 5\nformats = ["PNG"]\n'
        '[models.pets]\nmodel = "resnet18"\nweights = "pets.pth"\nmethods = ["gradcam"]\nmax_batch = 8\n'
        '[models.b]\nweights = "IMAGENET1K_V1"\n',
    )
    assert (told.host, told.port, told.token, told.pre_stop) == ("0.0.0.0", 80, "0123456789abcdef", 5.0)
    assert told.limits == Limits(body=5, formats=("PNG",)) and list(told.models) == ["pets", "b"]
    pets = told.models["pets"]
    assert pets.weights == str(tmp_path / "pets.pth") and pets.methods == ("gradcam",) and pets.max_batch == 8
    assert told.models["b"].weights == "IMAGENET1K_V1"
    assert "0123456789abcdef" not in repr(told)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "cannot be read"),
        ("prot = 80", "unknown key 'prot'"),
        ('port = "80"', "port must be int"),
        ("port = true", "port must be int"),
        ("port = -1", "port must be 0 or more"),
        ("port = 65536", "port is 0"),
        ("grace = inf", "grace must be 0 or more, and finite"),
        ("stall = nan", "stall must be positive, and finite"),
        ("stall = true", "stall must be float"),
        ("[limits]\nrequest_time = nan", r"\[limits\]: request_time must be positive"),
        ("[limits]\nbody = 0", r"\[limits\]: body must be positive"),
        ("[limits]\nbody = -5", r"\[limits\]: body must be positive"),
        ("[limits]\nbody = 1.5", "body must be int"),
        ("[models.a]\ncheck = 5.0", r"\[models.a\]: check is a fraction"),
        ("[models.a]\nmax_batch = 0", "max_batch must be positive"),
        ("[models.a]\nwait = -1", "wait must be 0 or more"),
        ("[limits]\nbdoy = 1", "limits"),
        ("[limits]\nformats = [1]", "list of strings"),
        ("models = 3", "tables"),
        ("[models]\na = 3", "tables"),
        ('[models."../x"]', "letters"),
        ("[models.a]\nlayer = 3", "layer must be str"),
        ('token = "0123456789abcdef"', "token_file"),
        ('token_file = "absent"', "cannot be read"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ShapleyCamError, match=words):
        read(tmp_path, text)


def test_a_short_token_is_none(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short")
    with pytest.raises(ShapleyCamError, match="16"):
        read(tmp_path, 'token_file = "token"')


def test_options_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAPLEYCAM_TOKEN", "from the environment".replace(" ", "-"))
    told = configuration(None, {"model": "resnet18"}, "::1", 0, None)
    assert told.models == {"default": ModelConfig(model="resnet18")} and told.token == "from-the-environment"
    assert (told.host, told.port) == ("::1", 0)
    file = tmp_path / "a.toml"
    file.write_text("")
    with pytest.raises(ShapleyCamError, match="port is 0"):
        configuration(None, {}, None, 70_000, None)
    monkeypatch.setenv("SHAPLEYCAM_TOKEN", "")  # of a secret that is missing
    with pytest.raises(ShapleyCamError, match="SHAPLEYCAM_TOKEN.*16"):
        configuration(None, {}, None, None, None)
    monkeypatch.delenv("SHAPLEYCAM_TOKEN")
    assert configuration(None, {}, None, None, None).token is None
    with pytest.raises(ShapleyCamError, match="--max-batch and --config exclude"):
        configuration(file, {"max_batch": 1}, None, None, None)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (ModelConfig(runtime="tensorrt"), "tensorrt"),
        (ModelConfig(runtime="onnx"), "needs file"),
        (ModelConfig(file="x.onnx"), "onnx"),
        (ModelConfig(device="cuda:99"), "cuda:99"),
        (ModelConfig(methods=("gradcam", "nonsense")), "nonsense"),
        (ModelConfig(runtime="onnx", file="/nonexistent.onnx"), "cannot be run"),
        (ModelConfig(runtime="onnx", file="/nonexistent.onnx", check=0.1), "check is not for files"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(told: ModelConfig, words: str) -> None:
    with pytest.raises(ShapleyCamError, match=words):
        load_runtime(told)
