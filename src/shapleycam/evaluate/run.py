"""The ADCC evaluation of one network over many pictures: resumable, and the same to the last digit when it is resumed.

Batches are fixed by the order of the pictures and the batch size, broken pictures included. The sums are float64 and are
written as text that keeps every digit, together with all that the result depends on. RandomCAM's numbers are drawn per batch.
So a run that was interrupted goes on at its last whole batch, one that was killed at its last saved batch, and both end with
the table of a run that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from .._version import __version__
from ..data.files import write_whole
from ..data.samples import Sample, Samples
from ..errors import InputError
from ..explainer import Explainer
from ..methods.table import PAPER_METHODS, get_method
from ..model.zoo import Classifier
from ..optional import need
from .metrics.functional import measure

if TYPE_CHECKING:
    from .metrics import ADCC

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is measured, and how.

    Attributes:
        methods: names of :data:`shapleycam.METHODS`.
        utility, layer, engine, nodes, baseline, backend: as for :class:`shapleycam.Explainer`.
        batch_size: pictures that go through the model at once.
        seed: of RandomCAM.
        workers: processes that decode pictures; no part of the result.
        save_every: batches between two saved states; no part of the result.
    """

    methods: tuple[str, ...] = PAPER_METHODS
    utility: str = "rest"
    layer: str | tuple[str, ...] = "auto"
    engine: str = "auto"
    nodes: int | str | None = None
    baseline: str = "zero"
    backend: str = "auto"
    batch_size: int = 16
    seed: int = 0
    workers: int = 0
    save_every: int = 10


@dataclass(slots=True)
class Outcome:
    """What a run found, also before its end.

    Attributes:
        rows: per method {"AD", "Coh", "Com", "ADCC", "IC", "ADD"} as shares in [0, 1].
        images: pictures that count. skipped: pictures for which a method gave NaN or Inf.
        unreadable: (name, reason) of the pictures that could not be read.
        labelled, correct: pictures with a label that the model knows, and those of them it classified so.
        unknown_labels: labels that are no class of the model, and their pictures' number.
        batches, done: batches in all, and behind us.
        resumed: batches that an earlier run had done.
        layers, engine: what the explainer used.
    """

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    images: int = 0
    skipped: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    labelled: int = 0
    correct: int = 0
    unknown_labels: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    done: int = 0
    resumed: int = 0
    layers: tuple[str, ...] = ()
    engine: str = ""


def evaluate(
    classifier: Classifier,
    samples: Samples,
    protocol: Protocol,
    state: Path | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Outcome:
    """Run the evaluation, or finish one.

    Args:
        classifier: model and class names; its device is the model's.
        samples: the pictures, cut for this classifier.
        protocol: what is measured.
        state: a JSON file that is written after every ``save_every`` batches, at the end, and when the run is interrupted or
            fails, in one piece, and that a later call with the same arguments takes up; None to keep nothing.
        progress: called with the batches behind us and in all.

    Raises:
        InputError: no picture can be read, or the state belongs to other pictures, weights or settings.
    """
    need("torchmetrics", "metrics")
    from .metrics import ADCC

    methods = tuple(get_method(name).name for name in protocol.methods)
    device = next(classifier.model.parameters()).device
    explainer = Explainer(
        classifier.model,
        layer=protocol.layer if isinstance(protocol.layer, str) else list(protocol.layer),
        utility=protocol.utility,
        engine=protocol.engine,
        nodes=protocol.nodes,
        baseline=protocol.baseline,
        backend=protocol.backend,
    )
    size = protocol.batch_size
    if size < 1 or protocol.save_every < 1:
        raise InputError(f"batch_size and save_every must be at least 1, got {size} and {protocol.save_every}.")
    outcome = Outcome(batches=-(-len(samples) // size))
    tables = {name: ADCC().to(device) for name in methods}
    key = _key(classifier, samples, protocol, methods)
    if state is not None and state.exists():
        _restore(_load(state, key), outcome, tables)
    _study(explainer, classifier, samples, methods, device, outcome)
    label_of = classifier.label_reader(samples.labels)
    loader: DataLoader[Any] = DataLoader(
        Subset(samples, range(outcome.done * size, len(samples))),
        batch_size=size,
        collate_fn=list,
        num_workers=protocol.workers,
    )
    progress(outcome.done, outcome.batches)
    unsaved: dict[str, Any] | None = None  # the state behind the last whole batch, until it is in the file
    try:
        for batch in loader if outcome.done < outcome.batches else ():
            # The random numbers of a batch do not depend on where the run began.
            explainer.reseed(protocol.seed * 1_000_003 + outcome.done)
            _add(batch, explainer, classifier, methods, tables, outcome, label_of, device)
            outcome.done += 1
            if state is not None:
                unsaved = _content(key, outcome, tables)
                if outcome.done % protocol.save_every == 0 or outcome.done == outcome.batches:
                    _save(state, unsaved)
                    unsaved = None
            progress(outcome.done, outcome.batches)
    except BaseException:
        # Ctrl-C, memory that ran out, …: in the middle of a batch, so what counts is the state before it.
        if state is not None and unsaved is not None:
            _save(state, unsaved)
        raise
    outcome.rows = {name: {column: float(value) for column, value in table.compute().items()} for name, table in tables.items()}
    outcome.images = min(int(table.images) for table in tables.values())
    outcome.skipped = max(int(table.skipped) for table in tables.values())
    return outcome


def _add(
    batch: list[Sample],
    explainer: Explainer,
    classifier: Classifier,
    methods: tuple[str, ...],
    tables: dict[str, ADCC],
    outcome: Outcome,
    label_of: Callable[[str | int | None], int | None],
    device: torch.device,
) -> None:
    outcome.unreadable += [(sample.name, sample.view) for sample in batch if isinstance(sample.view, str)]
    good = [sample for sample in batch if isinstance(sample.view, Tensor)]
    if not good:
        return
    images = classifier.preprocess.normalise(torch.stack([s.view for s in good if isinstance(s.view, Tensor)]).to(device))
    images = images.to(next(classifier.model.parameters()).dtype)
    with torch.no_grad():
        measured = measure(explainer, images, None, methods)
    for name, found in measured.items():
        tables[name].update(*found.tensors)
    first = next(iter(measured.values()))
    for sample, predicted in zip(good, first.targets.tolist(), strict=True):
        label = label_of(sample.label)
        if label is None:
            if sample.label is not None:
                known = outcome.unknown_labels
                known[str(sample.label)] = known.get(str(sample.label), 0) + 1
            continue
        outcome.labelled += 1
        outcome.correct += int(predicted == label)


def _study(
    explainer: Explainer,
    classifier: Classifier,
    samples: Samples,
    methods: tuple[str, ...],
    device: torch.device,
    outcome: Outcome,
) -> None:
    """Show the explainer the first two readable pictures, so that its plan does not depend on where the run goes on."""
    views: list[Tensor] = []
    for index in range(len(samples)):
        view = samples[index].view
        if isinstance(view, Tensor):
            views.append(view)
        if len(views) == 2:
            break
    if not views:
        first = samples[0]
        raise InputError(f"None of the {len(samples)} pictures can be read; the first is {first.name}: {first.view}")
    images = classifier.preprocess.normalise(torch.stack(views).to(device))
    images = images.to(next(classifier.model.parameters()).dtype)
    for name in {get_method(name).order: name for name in sorted(methods)}.values():
        used = explainer.compare(images, methods=name)[name].diagnostics
        outcome.layers = used.layers
        outcome.engine = used.engine if used.engine != "none" else outcome.engine
    highest = max(methods, key=lambda name: get_method(name).order)
    together = explainer.compare(images, methods=methods)[highest].diagnostics
    outcome.layers, outcome.engine = together.layers, together.engine


# ------------------------------------------------------------------------------------------------------------ the state


def _key(classifier: Classifier, samples: Samples, protocol: Protocol, methods: tuple[str, ...]) -> dict[str, Any]:
    """All that the numbers depend on."""
    settings = {name: value for name, value in asdict(protocol).items() if name not in ("workers", "save_every")}
    settings["layer"] = [protocol.layer] if isinstance(protocol.layer, str) else list(protocol.layer)
    device = next(classifier.model.parameters()).device
    return {
        **settings,
        "methods": list(methods),
        "model": classifier.name,
        "weights": classifier.fingerprint(),
        "preprocess": repr(classifier.preprocess),
        "pictures": samples.fingerprint(),
        "device": device.type,
        "torch": torch.__version__,
        "shapleycam": __version__,
    }


def _content(key: dict[str, Any], outcome: Outcome, tables: dict[str, ADCC]) -> dict[str, Any]:
    """The state, in copies that the next batch does not change."""
    return {
        "format": _FORMAT,
        "key": key,
        "done": outcome.done,
        "tables": {name: table.save() for name, table in tables.items()},
        "unreadable": list(outcome.unreadable),
        "labelled": outcome.labelled,
        "correct": outcome.correct,
        "unknown_labels": dict(outcome.unknown_labels),
    }


def _save(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content))


def _load(file: Path, key: dict[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        theirs = content["key"] if content["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not the state of an evaluation ({error}): remove it or use --restart.") from error
    if theirs != key:
        odd = [name for name in key if theirs is None or theirs.get(name) != key[name]]
        raise InputError(
            f"{file} belongs to an evaluation with another {', '.join(odd) or 'format'}: use --restart to overwrite it, or "
            "another --output."
        )
    assert isinstance(content, dict)
    return content


def _restore(content: dict[str, Any], outcome: Outcome, tables: dict[str, ADCC]) -> None:
    for name, table in tables.items():
        table.restore(content["tables"][name])
    outcome.done = outcome.resumed = content["done"]
    outcome.unreadable = [(name, reason) for name, reason in content["unreadable"]]
    outcome.labelled, outcome.correct = content["labelled"], content["correct"]
    outcome.unknown_labels = dict(content["unknown_labels"])
