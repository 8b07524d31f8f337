"""The paper's table for the photographs that come with scikit-image, with the embedded network; nothing is downloaded.

    python -m bench.photographs [UTILITY …]

Runs ``shapleycam evaluate`` on the demo's photographs, once per utility (rest by default), and writes the command's JSON, with
the commit, to ``bench/results/photographs-<utility>.json``. Five pictures say nothing about which method is better: this
shows that the road is passable, and fixes its numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from shapleycam.cli.app import run
from shapleycam.cli.demo import photographs
from shapleycam.data.images import read_image

RESULTS = Path(__file__).parent / "results"


def main(utilities: list[str]) -> None:
    for utility in utilities:
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder) / "pictures"
            pictures.mkdir()
            for file in photographs():
                read_image(file).save(pictures / f"{file.stem}.png")
            status = run(["evaluate", str(pictures), "--utility", utility, "--output", f"{folder}/out"])
            if status:
                sys.exit(status)
            content = json.loads((Path(folder) / "out" / "table.json").read_text())
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        content["conditions"] |= {
            "commit": commit.stdout.strip(),
            "scikit-image": metadata.version("scikit-image"),
            "pillow": metadata.version("pillow"),
            "torchmetrics": metadata.version("torchmetrics"),
            "pictures": [file.name for file in photographs()],
        }
        file = RESULTS / f"photographs-{utility}.json"
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {file}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["rest"])
