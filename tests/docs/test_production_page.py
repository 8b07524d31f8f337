"""What docs/production.md says is so: its code runs, its configuration is read, its tables are those of the server."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image

from shapleycam.serve import Service
from shapleycam.serve.config import Limits, ModelConfig, read_config

from ..serve.test_process import Process
from ..serve.test_runtimes import ALL, write
from ..serve.tiny import SIDE, classifier, known, live

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TRITON_CLIENT, FASTAPI, BATCHER, RAY, REPOSITORY = PYTHON
CLIENT = httpx.Client(timeout=60, verify=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipes load the demo's network; here it is the tests' own."""
    monkeypatch.setattr("shapleycam.models.load_classifier", lambda *_, **__: classifier())


def test_the_configuration_is_read(tmp_path: Path) -> None:
    [block] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "serve.toml").write_text(block)
    (tmp_path / "token").write_text("0123456789abcdef")
    told = read_config(tmp_path / "serve.toml")
    assert list(told.models) == ["pets", "exported"] and told.token == "0123456789abcdef" and told.pre_stop == 5
    example = read_config(ROOT / "examples" / "serve" / "serve.toml")
    assert example.host == "0.0.0.0" and example.port == 8080


def test_every_kind_of_refusal_is_in_the_table() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", TEXT, re.MULTILINE)
    documented = {(int(status), kind) for status, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)}
    sources = "".join(p.read_text() for p in (ROOT / "src/shapleycam/serve").rglob("*.py"))
    raised = {(int(s), k) for s, k in re.findall(r'(?:Refusal|Verdict)\(\s*(\d{3}),\s*"(\w+)"', sources)}
    raised |= {(int(s), k) for s, k in re.findall(r'\((\d{3}), "(\w+)"\)', sources)}
    assert raised - {(500, "internal")} <= documented | {(404, "not_found")}, raised - documented
    assert documented <= raised | {(404, "not_found")}, documented - raised


def test_addresses_in_the_page_are_those_of_the_server() -> None:
    from shapleycam.serve import ExplainerRuntime
    from shapleycam.serve.app import create_app
    from shapleycam.serve.config import ServerConfig
    from shapleycam.serve.server import Server

    server = Server(ServerConfig(models={"m": ModelConfig()}), {"m": ExplainerRuntime(classifier())})
    document = create_app(server).openapi()
    for path in ("/v1/models", "/ping", "/predictions/{m}", "/explanations/{m}", "/v2", "/v2/models/{m}", "/v1/models/{m}"):
        assert path in TEXT and path.replace("{m}", "{model}") in document["paths"]
    query = {p["name"] for p in document["paths"]["/v1/explain"]["post"]["parameters"]}
    table = TEXT[TEXT.index("| parameter | |") : TEXT.index("With `topk` above 1")]
    named = {name for row in table.splitlines()[2:] if "|" in row for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == query


def test_the_figures_are_those_of_the_file() -> None:
    from bench.serve import table

    content = json.loads((ROOT / "bench" / "results" / "serve-cpu.json").read_text())
    assert table(content) in TEXT
    text = " ".join(TEXT.split())
    ours = {round(100 * (content["beside"][peer]["shapleycam"]["processor_time"] - 1)) for peer in ("litserve", "ray")}
    [added], theirs = ours, content["beside"]["ray"]["ray"]
    assert f"adds to the bare call: {added} %, and Ray Serve {100 * (theirs['processor_time'] - 1):.0f} %" in text
    samples = [
        row[key]
        for peer in content["beside"].values()
        for row in peer.values()
        for key in row
        if key.endswith("_samples") and not key.startswith("bare")
    ]
    assert f"of {min(samples)} to {max(samples)} calls" in text and max(samples) <= 500  # p99: the fifth slowest at most
    assert f"a load average of {content['load_average'][0]:.0f}, " in text
    for peer in ("litserve", "ray"):
        assert content["beside"][peer]["shapleycam"]["saturation"] >= 0.9
        assert content["beside"][peer]["shapleycam"]["half_p99"] <= 2


#: What takes most memory of what Pillow decodes: a WebP with transparency.
DECODE = """
import io
from pathlib import Path
from PIL import Image
from shapleycam.serve.pictures import decode

def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

file = io.BytesIO()
exif = Image.Exif()
exif[274] = 6
Image.new("RGBA", (64, 64), (1, 2, 3, 4)).save(file, "WEBP", exif=exif)
decode(file.getvalue(), pixels=10**8)  # all is imported
data = Path(FILE).read_bytes()
before = peak()
decode(data, pixels=10**8)
print((peak() - before) / 2500**2)
"""


def test_the_memory_that_it_takes(tmp_path: Path) -> None:
    text = " ".join(TEXT.split())
    [(per_pixel, per_body, default, less)] = re.findall(
        r"(\d+) bytes a pixel .* (\d+) times `body` .* that is (\S+) GB, and with `pixels = 20_000_000` (\S+) GB", text
    )
    limits, decoders = Limits(), ModelConfig().decoders
    for pixels, told in ((limits.pixels, default), (20_000_000, less)):
        most = decoders * int(per_pixel) * pixels + 3 * limits.bodies + 2 * int(per_body) * limits.body
        assert f"{most / 1e9:.1f}" == told
    for unit in (b"[],", b'{"":{}},', b'{"":0},', b"[[]],", b"1e9,", b'"",', '"é",'.encode()):
        body = b"[" + unit * (300_000 // len(unit)) + b"0]"
        tracemalloc.start()
        json.loads(body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < int(per_body) * len(body), unit
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGBA", (2500, 2500), (1, 2, 3, 4)).save(tmp_path / "a.webp", exif=exif)
    code = DECODE.replace("FILE", repr(str(tmp_path / "a.webp")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert 20 < float(done.stdout) <= int(per_pixel)


def test_the_recipe_for_a_fastapi_application(tiny: Any) -> None:
    from fastapi.testclient import TestClient

    names: dict[str, Any] = {}
    exec(compile(FASTAPI, "production.md", "exec"), names)
    one = known(0)
    with TestClient(names["app"]) as client:
        answer = client.post("/where", content=one.data)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (SIDE, SIDE)
        assert client.post("/where", content=b"nothing").status_code == 422
    assert isinstance(names["service"], Service) and names["service"].state == "stopped"


def test_the_recipe_for_a_batcher() -> None:
    names: dict[str, Any] = {}
    exec(compile(BATCHER, "production.md", "exec"), names)
    assert names["length"] == 7 and names["batcher"].state == "stopped"


def test_the_recipe_for_tritons_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = known(0)
    (tmp_path / "cat.jpg").write_bytes(one.data)
    with live() as found:
        names: dict[str, Any] = {}
        code = TRITON_CLIENT.replace("127.0.0.1:8000", f"127.0.0.1:{found.port}").replace('"default"', '"tiny"')
        exec(compile(code, "production.md", "exec"), names)
        assert names["heatmap"].dtype == numpy.float16 and names["heatmap"].shape == (1, 1, SIDE, SIDE)
        names["client"].close()


@pytest.mark.slow
def test_the_recipe_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "explained.onnx", "given", ALL)
    exec(compile(REPOSITORY, "production.md", "exec"), {})
    assert "max_batch_size: 32" in (tmp_path / "repository" / "cams" / "config.pbtxt").read_text()


@pytest.mark.slow
def test_the_recipe_for_ray_serve(tmp_path: Path) -> None:
    """In a process of its own, as Ray starts others; with the tests' network."""
    script = tmp_path / "recipe.py"
    own = "import shapleycam.models, tests.serve.tiny\n        shapleycam.models.load_classifier = tests.serve.tiny.classifier"
    code = RAY.replace("from shapleycam.models import", f"{own}\n        from shapleycam.models import")
    script.write_text(
        f"import ray\nray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n{code}\n"
        "import httpx, sys\nfrom tests.serve.tiny import known\n"
        "answer = httpx.post('http://127.0.0.1:8000/explain', content=known(0).data, timeout=60)\n"
        "sys.stdout.buffer.write(answer.content)\nserve.shutdown()\nray.shutdown()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = numpy.load(io.BytesIO(done.stdout[done.stdout.index(b"\x93NUMPY") :]))
    assert numpy.allclose(found, known(0).raw[None], rtol=1e-4, atol=1e-6)


def test_the_example_for_kserve_asks_for_what_there_is() -> None:
    text = (ROOT / "examples" / "serve" / "inferenceservice.yaml").read_text()
    yaml = pytest.importorskip("yaml")
    [container] = yaml.safe_load(text)["spec"]["predictor"]["containers"]
    port = read_config(ROOT / "examples" / "serve" / "serve.toml").port
    assert container["ports"][0]["containerPort"] == port
    with live() as found:
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port
            assert CLIENT.get(found.url + container[probe]["httpGet"]["path"]).status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(
    "KSERVE_PYTHON" not in os.environ, reason="KSERVE_PYTHON names no interpreter with kserve; .ci/run makes one"
)
def test_the_example_for_kserve_is_read_by_kserves_own_classes() -> None:
    code = """
import re, sys, yaml
import kserve.models
import kubernetes.client

def check(value, kind):
    several = re.fullmatch(r"[Ll]ist\\[(.*)\\]", kind)
    if several:
        return sum(check(one, several[1]) for one in value)
    place = kserve.models if hasattr(kserve.models, kind) else kubernetes.client
    if not kind.startswith("V1"):
        return 0
    model = getattr(place, kind)
    known = {name: attribute for attribute, name in model.attribute_map.items()}
    unknown = value.keys() - known.keys()
    assert not unknown, f"{kind} has no {unknown}"
    return len(value) + sum(check(one, model.openapi_types[known[name]]) for name, one in value.items())

print(check(yaml.safe_load(open(sys.argv[1])), "V1beta1InferenceService"))
"""
    command = [os.environ["KSERVE_PYTHON"], "-c", code, str(ROOT / "examples" / "serve" / "inferenceservice.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # fields that were looked up


@pytest.mark.long
def test_the_steps_of_the_dockerfile_serve(tmp_path: Path) -> None:
    """RUN, COPY and CMD, in an environment beside this one, which has the packages that pip would fetch."""
    steps = re.sub(r"\\\n", "", (ROOT / "examples" / "serve" / "Dockerfile").read_text())
    source = tmp_path / "src"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    subprocess.run(["cp", "--parents", *(file for file in listed if (ROOT / file).exists()), source], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = Path(numpy.__file__).parents[1]
    (site / "beside.pth").write_text(f"{here}\n")
    [install] = re.findall(r"^RUN (SHAPLEYCAM_BUILD=cpu pip install .*)$", steps, re.MULTILINE)
    environment = {**os.environ, "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    install = install.replace("/src[", f"{source}[").replace("--no-cache-dir", "--no-cache-dir --quiet")
    done = subprocess.run(["bash", "-c", install], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    [copied] = re.findall(r"^COPY (examples\S+) /etc/shapleycam/serve.toml$", steps, re.MULTILINE)
    told = (ROOT / copied).read_text().replace("port = 8080", "port = 0").replace("pre_stop = 5", "pre_stop = 0")
    (tmp_path / "serve.toml").write_text(told)
    [command] = re.findall(r"^CMD (\[.*\])$", steps, re.MULTILINE)
    words = [word.replace("/etc/shapleycam", str(tmp_path)) for word in json.loads(command)]
    words[0] = str(tmp_path / "venv" / "bin" / words[0])
    server = Process(words, tmp_path / "log", environment)
    try:
        assert (site / "shapleycam" / "serve" / "page" / "index.html").is_file()  # the page is part of the package
        assert "Where did the network look" in CLIENT.get(f"{server.url}/").text
        assert CLIENT.get(f"{server.url}/readyz").status_code == 200
        server.popen.terminate()
        assert server.popen.wait(20) == 0
    finally:
        if server.popen.poll() is None:
            server.popen.kill()
