"""docs/export-networks.md from bench/results/export.json."""

from __future__ import annotations

from typing import Any


def page(report: dict[str, Any]) -> str:
    """The page; figures are printed as they were measured."""
    rows = report["rows"]
    facts = rows[0]["conditions"]
    timed = [(row, each) for row in rows for each in row.get("speed", ())]
    lines = [
        "# Artefacts of real networks",
        "",
        "`python -m bench.export` makes this page and `bench/results/export.json`. The weights are random and seeded but for",
        "EfficientNet-Lite0; 224 pixels; ShapleyCAM of ReST for the predicted class, display maps at the image's size.",
        "",
        "## Agreement with float64",
        "",
        "Largest difference on one and on three images to the explainer in float64: of the logits, relative to the image's",
        "largest; of the maps in terms of the signed map ([export.md](export.md#how-an-artefact-is-checked) says how),",
        "relative to its largest value; and plain, of the display map in [0, 1]. More than 1e-4 is refused.",
        "",
        "| network | layer | engine | ONNX Runtime: logits, map, display | OpenVINO | ExportedProgram | MB | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_agreement(row) for row in rows),
        "",
        "MB and s are the size of the ONNX file, and what the export took, with its checks.",
        "",
    ]
    columns = "over plain | over eager | pytorch-grad-cam"
    refused = [
        (row["network"], form, row[form]["refused"]) for row in rows for form in ("onnx", "pt2") if "refused" in row[form]
    ]
    if refused:
        lines += ["Refused:", "", *(f"- {network}, {form}: {reason}" for network, form, reason in refused), ""]
    lines += [
        "## Cost",
        "",
        "Medians of ratios of times (of the processor, with one thread), measured in turns in one process:",
        f"{facts['cpu']}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}, OpenVINO in",
        "float32. *over plain*: the exported explanation over the exported model alone; *over eager*: over a prediction by",
        "PyTorch; *pytorch-grad-cam*: its ShapleyCAM over the exported explanation.",
        "",
        f"| network | batch | {' | '.join(f'{name}: {columns}' for name in ('ONNX Runtime', 'OpenVINO'))} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_cost(row["network"], each) for row, each in timed),
        "",
        f"torch {facts['torch']}, onnx {facts['onnx']}, ONNX Runtime {facts['onnxruntime']}, OpenVINO {facts['openvino']}, "
        f"pytorch-grad-cam {facts['grad-cam']}.",
        "",
    ]
    return "\n".join(lines)


def _agreement(row: dict[str, Any]) -> str:
    def figures(form: str) -> str:
        found = row.get(form)
        if found is None or "refused" in found:
            return "refused" if found else "–"
        return f"{found['logits']:.0e}, {found['maps']:.0e}, {found['display']:.0e}"

    onnx = row["onnx"]
    size = ["–", "–"] if "refused" in onnx else [f"{onnx['megabytes']:.0f}", f"{onnx['seconds']:.0f}"]
    engine = row.get("engine", "–").replace("_", " ")
    cells = [row["network"], f"`{row['layer']}`", engine, *map(figures, ("onnx", "openvino", "pt2")), *size]
    return f"| {' | '.join(cells)} |"


def _cost(network: str, found: dict[str, Any]) -> str:
    cells = [network, str(found["batch"])]
    for runtime in ("onnxruntime", "openvino"):
        each = found[runtime]
        cells += [f"{each['over_plain']:.3f}", f"{each['over_eager']:.2f}"]
        cells.append(f"{each['grad_cam_over_it']:.1f}" if "grad_cam_over_it" in each else "–")
    return f"| {' | '.join(cells)} |"
