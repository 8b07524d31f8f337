"""The summary and the page; the page also in a real browser, where Debian's chromium is installed."""

import base64
import json
import math
import re
import shutil

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from shapleycam.attribute import attribute, open_maps
from shapleycam.attribute.gallery import gallery
from shapleycam.attribute.summary import concentration, entropy, groups, shares, summarise
from shapleycam.cli.app import run

from .conftest import SETTINGS, save

NAMES = [
    "</script><script>document.title='HACKED'<!--".replace("/", "∕"),
    "new\nline",
    "quote\"'&amp;&lt;",
    "{{7*7}}",
    "‮gnp.exe",
]


@pytest.fixture
def out(classifier, folder, tmp_path):
    for n, name in enumerate(NAMES):
        save(folder / "hostile <b>&" / f"{name}.png", 40 + n)
    (folder / "hostile <b>&" / "<img src=x onerror=alert(1)>.png").write_text("<script>alert(1)</script>")
    attribute(classifier, folder, tmp_path / "maps", SETTINGS, shard_size=8)
    return tmp_path / "maps"


def document(page):
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_numbers_of_a_map_by_hand():
    even, single = torch.ones(1, 4, 5), torch.zeros(1, 4, 5)
    single[0, 2, 3] = 7
    half = torch.zeros(1, 4, 5)
    half[0, 0] = 1
    half[0, 1] = -3  # negative content does not count
    maps = torch.cat((even, single, half, torch.full((1, 4, 5), float("nan")), -even))
    assert concentration(maps).tolist() == pytest.approx([0.1, 1, 0.4, 0, 0])
    assert entropy(maps).tolist() == pytest.approx([1, 0, math.log(5) / math.log(20), 0, 0], abs=1e-6)
    assert shares(maps).sum((1, 2)).tolist() == pytest.approx([1, 1, 1, 0, 0])


def test_groups_find_what_is_alike():
    generator = torch.Generator().manual_seed(0)
    spots = torch.zeros(3, 7, 7)
    spots[0, 1, 1] = spots[1, 5, 5] = spots[2, 1, 5] = 1
    kinds = torch.tensor([0] * 20 + [1] * 12 + [2] * 5)[torch.randperm(37, generator=generator)]
    strength = torch.rand(37, 1, 1, generator=generator) + 0.1
    maps = (spots[kinds] + 0.02 * torch.rand(37, 7, 7, generator=generator)) * strength
    belongs, means = groups(maps, 3)
    assert torch.equal(belongs, kinds) and means.flatten(1).argmax(1).tolist() == [8, 40, 12]
    torch.testing.assert_close(means[1], shares(maps[kinds == 1]).mean(0))
    again, _ = groups(maps, 3)
    assert torch.equal(belongs, again)
    assert len(groups(maps[:1].repeat(4, 1, 1), 9)[1]) == 1 and len(groups(maps[:0], 3)[0]) == 0


def test_the_summary_counts(out):
    maps = open_maps(out)
    summary = summarise(maps)
    assert (summary.pictures, summary.rows, summary.statuses) == (29, 29, {"ok": 26, "undecodable": 3})
    assert sum(summary.errors.values()) == 3 and sum(each.count for each in summary.classes) == 26
    rows = [row for row in maps if row.status == "ok"]
    for each in summary.classes:
        mine = [row for row in rows if row.target == each.target]
        assert len(mine) == each.count and each.name == maps.class_name(each.target)
        assert each.probability == pytest.approx(sum(row.probability for row in mine) / len(mine), rel=1e-5)
        torch.testing.assert_close(each.mean, shares(torch.stack([row.raw for row in mine])).mean(0), atol=1e-5, rtol=1e-4)
    assert summary.entropy == pytest.approx(float(entropy(torch.stack([row.raw for row in rows])).mean()), rel=1e-4)


def test_the_document_in_the_page(out):
    maps = open_maps(out)
    page = gallery(maps, summarise(maps), count=4)
    data = document(page)
    assert page.count("<script") == 2 and "HACKED'<" not in page and "http" not in page.replace("http-equiv", "")
    assert data["rows"]["key"] == list(maps.keys()) and any("HACKED" in key for key in data["rows"]["key"])
    levels = base64.b64decode(data["maps"])
    size = math.prod(maps.grid)
    for n, row in enumerate(maps):
        values = torch.tensor(list(levels[n * size : (n + 1) * size]), dtype=torch.float32) / 255
        if row.status == "ok":
            torch.testing.assert_close(values.view(maps.grid), maps.heatmap(n, maps.grid), atol=0.003, rtol=0)
            assert base64.b64decode(data["thumbnails"][n])[:2] == b"\xff\xd8"
        else:
            assert not values.any() and data["thumbnails"][n] == "" and data["group"][n] is None
    assert sum(each["count"] for each in data["groups"]) == 26 and len(data["groups"]) <= 4
    small = document(gallery(maps, summarise(maps), limit=10, pictures=False))
    assert small["shown"] == 10 and small["thumbnails"] == [] and small["rows"]["key"][0] == data["rows"]["key"][0]


def test_the_command(out, tmp_path, capsys):
    assert run(["maps", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["statuses"] == {"ok": 26, "undecodable": 3} and [file[-4:] for file in printed["files"]] == ["html", ".jpg"]
    assert run(["maps", str(out), "--out", str(tmp_path / "page"), "--no-pictures"]) == 0
    said = capsys.readouterr().out
    assert "29 of 29 pictures are done: 26 ok, 3 undecodable" in said and "contact-sheet" not in said
    shutil.move(tmp_path / "pictures", tmp_path / "moved")
    assert run(["maps", str(out), "--out", str(tmp_path / "page")]) == 0
    captured = capsys.readouterr()
    assert "without pictures:" in captured.err and "gallery.html" in captured.out
    assert run(["maps", str(out), "--out", str(tmp_path / "page"), "--source", str(tmp_path / "moved")]) == 0
    assert (tmp_path / "page" / "contact-sheet.jpg").exists()
    assert run(["maps", str(tmp_path)]) == 2 and "no result of shapleycam attribute" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ a browser


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("selenium.webdriver")
    chromium, service = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or service is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = driver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with driver.Chrome(options, driver.ChromeService(service)) as opened:
        yield opened


def script(browser, code):
    return browser.execute_script(f"return {code}")


def choose(browser, control, value):
    browser.execute_script(
        f"const e = document.getElementById('{control}'); e.value = arguments[0]; (e.oninput || e.onchange)()", value
    )


def shown(browser):
    return [int(n) for n in script(browser, "[...document.querySelectorAll('.card')].map(c => c.dataset.row)")]


@pytest.mark.slow
def test_in_a_browser(out, browser, tmp_path):
    maps = open_maps(out)
    page = tmp_path / "gallery.html"
    page.write_text(gallery(maps, summarise(maps), count=4, title="<b>title</b>"), encoding="utf-8")
    data = document(page.read_text(encoding="utf-8"))
    browser.get(page.as_uri())
    assert browser.title == "Attribution maps: <b>title</b>"
    assert script(browser, "document.querySelectorAll('script').length") == 2
    assert script(browser, "document.querySelectorAll('b b, #grid img[onerror], .text script').length") == 0
    assert sorted(script(browser, "[...document.querySelectorAll('.card b')].map(b => b.textContent)")) == sorted(maps.keys())
    # The maps are drawn as they are: jet of the levels, at the map's own resolution.
    row = maps.index("cat/04.png")
    pixel = script(
        browser,
        f"[...document.querySelector('[data-row=\"{row}\"] canvas').getContext('2d').getImageData(3, 2, 1, 1).data]",
    )
    from shapleycam import ops

    expected = ops.overlay(torch.zeros(1, 3, *maps.grid), maps.heatmap(row, maps.grid)[None], alpha=1.0)[0, 2, 3]
    assert pixel[:3] == pytest.approx(expected.tolist(), abs=4) and pixel[3] == 255
    choose(browser, "alpha", "0.25")
    assert script(browser, "getComputedStyle(document.querySelector('.card canvas')).opacity") == "0.25"
    # Filters and sorting.
    choose(browser, "status", "undecodable")
    assert {data["rows"]["status"][n] for n in shown(browser)} == {"undecodable"} and len(shown(browser)) == 3
    choose(browser, "status", "")
    target = str(data["classes"][0]["target"])
    choose(browser, "class", target)
    assert len(shown(browser)) == data["classes"][0]["count"]
    assert script(browser, "document.querySelector('#classes [aria-pressed=true]').dataset.value") == target
    choose(browser, "class", "")
    for by in ("concentration", "entropy"):
        choose(browser, "sort", by)
        for direction in (1, -1):
            choose(browser, "direction", str(direction))
            values = [data[by][n] for n in shown(browser)]
            numbers = [v for v in values if v is not None]
            assert numbers == sorted(numbers, reverse=direction < 0) and values[len(numbers) :] == [None] * 3
    choose(browser, "sort", "completeness_gap")
    gaps = [abs(v) for n in shown(browser) if (v := data["rows"]["completeness_gap"][n]) is not None]
    assert gaps == sorted(gaps, reverse=True) and len(gaps) == 26
    browser.execute_script("document.querySelector('#groups button').click()")
    assert {data["group"][n] for n in shown(browser)} == {0}
    browser.execute_script("document.querySelector('#groups button').click()")
    choose(browser, "name", "UNICORN")
    assert all("unicorn" in data["rows"]["key"][n] for n in shown(browser)) and shown(browser)
    browser.execute_script("document.querySelector('.card').click()")
    assert script(browser, "document.getElementById('dialog').open && document.querySelector('dl').textContent").count(
        "unicorn"
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_ten_thousand_rows_in_a_browser(out, browser, tmp_path):
    """The document of a small result repeated: what the page does with it is what counts here."""
    maps = open_maps(out)
    page = gallery(maps, summarise(maps), count=4)
    data = document(page)
    times = 10_000 // data["shown"] + 1
    for name in ("concentration", "entropy", "group", "thumbnails"):
        data[name] *= times
    data["rows"] = {name: column * times for name, column in data["rows"].items()}
    data["maps"] = base64.b64encode(base64.b64decode(data["maps"]) * times).decode()
    data["shown"] *= times
    text = json.dumps(data).replace("<", "\\u003c")
    file = tmp_path / "large.html"
    file.write_text(
        re.sub(r'(id="data">).*?(</script>)', lambda m: m[1] + text + m[2], page, flags=re.DOTALL), encoding="utf-8"
    )
    browser.get(file.as_uri())
    assert len(shown(browser)) == 60 and f"{data['shown']} of {data['shown']}" in script(browser, "document.body.textContent")
    choose(browser, "sort", "entropy")
    for _ in range(3):
        browser.execute_script("document.getElementById('next').click()")
    values = sorted(v for v in data["entropy"] if v is not None)
    assert [data["entropy"][n] for n in shown(browser)] == values[180:240]
