"""The net of a run: an AlexNet or another library's classifier, new or from weights, compiled if it helps."""

import re
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from model import AlexNet, ModelConfig
from model.lrn import ResponseNorm
from pipeline.errors import ConfigError, DataError, first_line
from pipeline.settings import did_you_mean

from .checkpoint import Weights, find


def create_net(config: ModelConfig, *, classes: int, crop: int, crop_sizes: tuple[int, ...] = ()) -> nn.Module:
    """Makes the net of `config`, newly initialised, in training mode, with layers frozen by config.freeze.

    crop_sizes: other crops that it must accept.
    forward: (N, 3, crop, crop) float → (N, classes) logits. Raises ConfigError for a net that cannot work.
    """
    alexnet = ":" not in config.name
    field = "augment.crop"
    try:
        net = AlexNet(config, classes=classes, crop=crop) if alexnet else _others_net(config.name, classes)
        for size in (crop, *crop_sizes):
            if not alexnet:
                _check_crop(net, config.name, size)
            elif size != crop:
                with torch.device("meta"):
                    AlexNet(config, classes=1, crop=size)
            field = "train.crop_sizes"
    except ValueError as err:
        raise ConfigError(str(err).replace("augment.crop", field, 1)) from err
    if config.freeze == "features":
        _freeze(net)
    return net


def _others_net(name: str, classes: int) -> nn.Module:
    """Makes torchvision:NAME or timm:NAME, with that library's initialisation."""
    library, _, which = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        make: Callable[..., nn.Module] = models.get_model
        if which in ("googlenet", "inception_v3"):  # by default they return more than logits in training
            make = partial(make, aux_logits=False, init_weights=True)
    elif library == "timm":
        try:
            import timm
        except ImportError as err:
            raise ConfigError(f"model.name={name}: timm is not installed; pip install timm") from err
        known = timm.list_models()
        make = timm.create_model
    else:
        raise ConfigError(f"model.name={name}: choose torchvision:NAME or timm:NAME")
    if which not in known:
        raise ConfigError(f"model.name={name}: {library} has no classifier {which!r}{did_you_mean(which, known)}")
    return make(which, num_classes=classes)


def _check_crop(net: nn.Module, name: str, crop: int) -> None:
    """Raises ValueError, before any data is read, if another library's net cannot take the crop."""
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, AssertionError, ValueError) as err:
        raise ValueError(f"augment.crop={crop} does not suit model.name={name}: {first_line(err)}") from err
    net.train()


# Weights

OTHER_NET = "it holds another net's weights; choose its model.name and width"


def load_weights(net: nn.Module, path: Path, *, other_classes: bool = False, cure: str = OTHER_NET) -> str | None:
    """Loads weights of the same net. The output layer keeps its new weights if the number of classes differs, or with
    other_classes.

    Returns a note in that case, or None. Raises DataError, with the cure, if other names, shapes or kinds of dtype
    differ.
    """
    weights, wanted = read_weights(path), net.state_dict()
    note = None
    for head, layer in heads(net):
        classes, ours = _classes_of(weights, layer, head), len(layer.weight)
        if classes and (other_classes or classes != ours):
            other = " other" * (classes == ours)
            note = f"{path} is of {classes}{other} classes: the output layer {head} is new, with {ours}"
            weights |= {n: wanted[n] for n in (f"{head}.weight", f"{head}.bias") if n in weights}
    for name, w in wanted.items():
        if name not in weights:
            raise DataError(f"{path}: has no {name}; {cure}")
        theirs = weights[name]
        if theirs.shape != w.shape:
            raise DataError(f"{path}: {name} is {tuple(theirs.shape)} but this net has {tuple(w.shape)}; {cure}")
        if theirs.is_floating_point() != w.is_floating_point():
            raise DataError(
                f"{path}: {name} is of {theirs.dtype} but this net has {w.dtype}; save the weights as floating-point"
                " numbers"
            )
        if theirs.is_floating_point() and not theirs.isfinite().all():
            raise DataError(f"{path}: {name} holds NaN or infinity; take weights of an earlier checkpoint")
    if unknown := [name for name in weights if name not in wanted]:
        raise DataError(f"{path}: has {_plain(unknown[0])}, which this net has not; {cure}")
    net.load_state_dict(weights)
    return note


def _classes_of(weights: Weights, layer: Any, head: str) -> int:
    """The number of classes in the file's output layer, if the layer differs in nothing else; otherwise 0."""
    weight, bias = weights.get(f"{head}.weight"), weights.get(f"{head}.bias")
    if weight is None or weight.shape[1:] != layer.weight.shape[1:]:
        return 0
    return len(weight) if bias is None or bias.shape == weight.shape[:1] else 0


def read_weights(path: Path) -> Weights:
    """Reads {name: tensor} from a run's best checkpoint, a checkpoint, a .safetensors file or a torch.save state_dict.

    Unpickles nothing but tensors. Raises DataError for anything else.
    """
    try:
        saved = _read(path)
    except FileNotFoundError as err:
        raise DataError(f"model.init={path}: no such file") from err
    except (DataError, OSError):
        raise
    except Exception as err:  # a damaged pickle may raise anything
        raise DataError(f"{path}: {_why_unreadable(err)}; nothing of it was run") from err
    while isinstance(saved, dict) and len(inner := [saved[n] for n in WRAPPERS if isinstance(saved.get(n), dict)]) == 1:
        saved = inner[0]
    if not isinstance(saved, dict) or not saved or not all(isinstance(w, Tensor) for w in saved.values()):
        raise DataError(f"{path}: holds no state_dict: names and tensors")
    weights = {str(name).removeprefix("module."): w for name, w in saved.items()}  # DDP's prefix
    if len(weights) < len(saved):
        raise DataError(f"{path}: holds weights twice, with and without 'module.' before their names")
    for name, w in weights.items():
        if w.is_meta or w.layout is not torch.strided or w.is_quantized or w.is_complex():
            raise DataError(f"{path}: {_plain(name)} is no plain tensor of numbers; save the weights as such")
    return weights


WRAPPERS = ("state_dict", "model")  # as many training scripts save them


def _read(path: Path) -> Any:
    if path.is_dir():
        return find(path)[1].model
    if path.suffix.lower() == ".safetensors":
        return deserialise(path.read_bytes())  # load_file opens no path that is not UTF-8
    if path.suffix.lower() == ".onnx":
        raise DataError(f"{path}: ONNX holds no trainable net; give the checkpoint or .safetensors that it was made of")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses; a compressed file could expand to more than the memory.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise DataError(f"{path}: is compressed, which torch.save does not do; save the weights again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols: the file is read or rejected in any case
        return torch.load(path, map_location="cpu", weights_only=True)


def _why_unreadable(err: Exception) -> str:
    if (found := re.search(r"GLOBAL:? ([\w.]+)", str(err))) is not None:
        return f"holds {found[1]}, which is no part of weights"
    if not isinstance(err, SafetensorError | RuntimeError):
        return "damaged, or more than weights"
    return f"cannot be read as weights ({_plain(first_line(err))[:120]})"


def _plain(text: str) -> str:
    """Returns the text on one line, without terminal escape sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).encode("unicode_escape").decode()


def heads(net: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the output layers: timm's classifier of the net, else the last layer with weights."""
    weighted = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    named: Any = getattr(net, "get_classifier", tuple)()
    named = named if isinstance(named, tuple | list) else (named,)
    return [(n, m) for n, m in weighted if m in named] or weighted[-1:]


def _freeze(net: nn.Module) -> None:
    """Freezes an AlexNet's layers before the fully connected ones, or all but the last layer of another net. Frozen
    batch normalisation keeps its statistics."""
    frozen, trained = [net], [head for _, head in heads(net)]
    if isinstance(net, AlexNet):
        frozen, trained = net.feature_layers(), []
    for module in (*frozen, *trained):
        module.requires_grad_(module in trained).train(module in trained)


# Compiling


def compile_net(net: nn.Module, how: str, device: torch.device, *, world: int = 1) -> str:
    """Compiles the net in place. how: train.compile. world: number of DDP ranks. Returns what was done, or why not."""
    if how == "auto":
        how = "model" if device.type == "cuda" else "norm"
    why = ""
    if how == "model" and world > 1 and TorchVersion(torch.__version__) < TorchVersion("2.14"):
        how, why = "norm", f": a whole model on several ranks needs torch 2.14 or newer, not {torch.__version__}"
    norms = [m for m in net.modules() if isinstance(m, ResponseNorm)]
    if how == "off" or (how == "norm" and not norms):
        return f"nothing{why}"
    if reason := no_compiler(device):
        return f"nothing: torch.compile does not work here ({reason}); --train.compile off leaves it out"
    if how == "norm":
        for module in norms:
            module.compiled = True
        return f"response normalisation{why}"
    # Sizes are known: with symbolic ones, from the second crop size on, Inductor leaves out its layout optimisation.
    net.compile(dynamic=False)
    return "the model"


def no_compiler(device: torch.device) -> str | None:
    """Returns the reason why torch.compile does not work here, or None; tries it on a tiny function."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as err:  # of many kinds: a compiler that is missing, old, or not allowed to write its cache
        return first_line(err)[:120]
    return None
