"""The page at /: a photograph in, its map out. Plain files, no build step; everything that it loads comes from here."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Response

from ..refusals import Refusal
from ..server import Server

_FILES = {
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
#: In scikit-image's wheel, and in the public domain or CC0.
_EXAMPLES = {
    "cat": ("chelsea.png", "Stéfan van der Walt, CC0"),
    "coffee": ("coffee.png", "Rachel Michetti, CC0"),
    "astronaut": ("astronaut.png", "NASA, public domain"),
    "rocket": ("rocket.jpg", "SpaceX, CC0"),
}


def add_page(app: FastAPI, server: Server) -> None:
    """Add the page's routes; they are not part of the document."""
    folder = resources.files(__package__)
    index = folder.joinpath("index.html").read_bytes()
    files = {name: folder.joinpath(name).read_bytes() for name in _FILES}
    examples = _examples()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(index, media_type="text/html; charset=utf-8")

    @app.get("/page/examples", include_in_schema=False)
    async def list_examples() -> list[dict[str, str]]:
        return [{"name": name, "address": f"/page/examples/{name}", "credit": _EXAMPLES[name][1]} for name in examples]

    @app.get("/page/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in examples:
            raise Refusal(404, "not_found", "There is no such example.")
        kind = "image/png" if examples[name].suffix == ".png" else "image/jpeg"
        return Response(examples[name].read_bytes(), media_type=kind)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise Refusal(404, "not_found", "There is no such file.")
        return Response(files[name], headers={"content-type": _FILES[name], "cache-control": "max-age=300"})


def _examples() -> dict[str, Path]:
    """The photographs that are there: none without scikit-image, which is not imported."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "data"
    return {name: folder / file for name, (file, _) in _EXAMPLES.items() if (folder / file).is_file()}
