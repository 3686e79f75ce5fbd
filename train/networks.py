"""The net of a run: an AlexNet or another library's classifier, new or from weights, compiled where it helps."""

from __future__ import annotations

import difflib
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import load_file
from torch import Tensor, nn

from model import AlexNet, ModelConfig
from model.dropout import Dropout
from model.lrn import LocalResponseNorm, SpatialResponseNorm
from pipeline.errors import ConfigError, DataError

from . import checkpoint


def make_net(config: ModelConfig, *, classes: int, crop: int) -> nn.Module:
    """The net of `config`, newly initialised, frozen as config.freeze says.

    forward: (N, 3, crop, crop) float → (N, classes) logits. Raises ConfigError for nets that cannot be.
    """
    try:
        net = _others_net(config.name, classes) if ":" in config.name else AlexNet(config, classes=classes, crop=crop)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    _refuse_unsuitable(net, config.name, crop)
    if config.freeze == "features":
        for module in features(net):
            module.requires_grad_(False)
    return net


def _others_net(name: str, classes: int) -> nn.Module:
    """torchvision:NAME or timm:NAME, with weights of its own initialisation."""
    library, _, which = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        # These two return more than logits in training, unless told.
        extra: dict[str, Any] = {"aux_logits": False, "init_weights": True} if which in _WITH_AUX else {}
        make: Callable[..., Any] = partial(models.get_model, weights=None, **extra)
    elif library == "timm":
        try:
            import timm
        except ImportError as err:
            raise ConfigError(f"model.name={name}: timm is not installed; pip install timm") from err
        known = timm.list_models()
        make = partial(timm.create_model, pretrained=False)
    else:
        raise ConfigError(f"model.name={name}: choose torchvision:NAME or timm:NAME")
    if which not in known:
        close = difflib.get_close_matches(which, known, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"model.name={name}: {library} has no classifier {which!r}{meant}")
    net: nn.Module = make(which, num_classes=classes)
    return net


_WITH_AUX = ("googlenet", "inception_v3")


def _refuse_unsuitable(net: nn.Module, name: str, crop: int) -> None:
    """Before any data is read: some nets take one size of image only, or none below another."""
    if isinstance(net, AlexNet):
        return
    modes = [module for module in net.modules() if module.training]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, AssertionError, ValueError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise ConfigError(f"augment.crop={crop} does not suit model.name={name}: {reason}") from err
    for module in modes:
        module.training = True


# Weights


def load_weights(net: nn.Module, path: Path) -> str | None:
    """Loads weights of the same net; where the number of classes differs, the output layer stays new.

    Returns what is worth telling. Raises DataError where names or shapes differ otherwise.
    """
    weights = read_weights(path)
    head, layer = _head(net)
    wanted = net.state_dict()
    left_out = [n for n in (f"{head}.weight", f"{head}.bias") if n in wanted and n in weights]
    note = None
    if left_out and weights[left_out[0]].shape != wanted[left_out[0]].shape:
        classes = len(weights[left_out[0]])
        note = f"{path} is of {classes} classes: the output layer {head} starts anew with {len(layer.weight)}"
        weights = {name: w for name, w in weights.items() if name not in left_out}
    else:
        left_out = []
    for name, w in wanted.items():
        if name not in weights and name not in left_out:
            raise DataError(f"{path}: has no {name}; it holds another net's weights, choose its model.name")
        if name in weights and weights[name].shape != w.shape:
            theirs, ours = tuple(weights[name].shape), tuple(w.shape)
            raise DataError(f"{path}: {name} is {theirs} where this net has {ours}; choose its model.name and width")
    if unknown := [name for name in weights if name not in wanted]:
        raise DataError(f"{path}: has {unknown[0]}, which this net has not; choose its model.name")
    net.load_state_dict(weights, strict=False)
    return note


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors file, a checkpoint folder, or what torch.save made of a state_dict.

    Nothing is unpickled but tensors. Raises DataError for anything else.
    """
    try:
        if path.is_dir():
            return deserialise(checkpoint.verified(path)[checkpoint.MODEL])
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: it is read or refused, and that is told
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise DataError(f"model.init={path}: no such file") from err
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise DataError(f"{path}: holds more or less than weights ({reason[:120]}); nothing of it was run") from err
    for name in ("state_dict", "model"):  # as many training scripts wrap them
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
    if not isinstance(saved, dict) or not saved or not all(isinstance(w, Tensor) for w in saved.values()):
        raise DataError(f"{path}: holds no state_dict: names and tensors")
    return {str(name).removeprefix("module."): w for name, w in saved.items()}  # DDP's prefix


def _head(net: nn.Module) -> tuple[str, Any]:
    """Name and module of the output layer: the last one with weights."""
    weighted = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return weighted[-1]


def features(net: nn.Module) -> list[nn.Module]:
    """What model.freeze=features freezes: all before an AlexNet's fully connected layers, of others all but one."""
    if isinstance(net, AlexNet):
        return net.feature_layers()
    _, head = _head(net)
    return [m for m in net.modules() if m is not head and not list(m.children())]


def set_training(net: nn.Module, config: ModelConfig) -> None:
    """Training mode; batch normalisation of frozen layers keeps its statistics."""
    net.train()
    if config.freeze == "features":
        for module in features(net):
            module.eval()


def without_dropout(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, Dropout | nn.Dropout | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0


# Compiling


def compile_net(net: nn.Module, how: str, device: torch.device) -> str:
    """Compiles in place as train.compile says. Returns what was done, or why not."""
    if how == "auto":
        how = "model" if device.type == "cuda" else "norm"
    norms = [m for m in net.modules() if isinstance(m, LocalResponseNorm | SpatialResponseNorm)]
    if how == "off" or (how == "norm" and not norms):
        return "nothing"
    if reason := no_compiler(device):
        return f"nothing: torch.compile does not work here ({reason}); --train.compile off leaves it out"
    if how == "norm":
        for module in norms:
            module.compiled = True
        return "response normalisation"
    net.compile()
    return "the model"


def _add_one(x: Tensor) -> Tensor:
    return x + 1


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work, by trying it on the smallest of functions."""
    try:
        torch.compile(_add_one)(torch.zeros(2, device=device))
    except Exception as err:  # of many kinds: a compiler that is missing, old, or not allowed to write its cache
        return str(err).strip().splitlines()[0][:120] if str(err).strip() else type(err).__name__
    return None
