"""Weights of a model of one's own: from a module, its state, or a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dmmlib.ensemble import Ensemble, initialise
from dmmlib.errors import ModelError, StoreError
from dmmlib.stacking import copied, drawing
from dmmlib.trainer import Trainer

FEW, SAME = 8, 1e-3  # points that a module is compared on, and how near answers are, relative to the largest
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names in a state
Model = nn.Module | Mapping[str, Tensor] | str | Path


def loaded(model: Model, trainer: Trainer) -> nn.Module:
    """The recipe's module, in evaluation mode, with the weights of a model, its state, or a file of that.

    Raises ModelError if they do not fit, StoreError if the file cannot be read.
    """
    own = trainer.module().to(trainer.device)
    if isinstance(model, nn.Module):
        model = bare(model, own)
        state = model.state_dict()
    elif not isinstance(model, (Mapping, str, Path)):
        raise ModelError(f"model is a {type(model).__name__}; give a module, its state, or a file of that.")
    else:
        state = dict(model if isinstance(model, Mapping) else _read(Path(model)))
        for wrapper in WRAPPERS * 2:
            if not any(name.startswith(wrapper) for name in own.state_dict()):
                consume_prefix_in_state_dict_if_present(state, wrapper)
    if nested := [name for name, value in state.items() if isinstance(value, Mapping)]:
        raise ModelError(
            f"The weights are not a model's state: {nested[0]!r} is a mapping; give the state that it holds."
        )
    try:
        own.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        wanted = {name: tuple(v.shape) for name, v in own.state_dict().items()}
        shapes = {name: tuple(getattr(v, "shape", ())) for name, v in state.items()}
        faults = [f"{name} is missing" for name in wanted if name not in shapes]
        faults += [f"{name} is not of it" for name in shapes if name not in wanted]
        both = [name for name in wanted if name in shapes and wanted[name] != shapes[name]]
        faults += [f"{name} has shape {shapes[name]}, not {wanted[name]}" for name in both]
        more = f" and {len(faults) - 1} more such" if len(faults) > 1 else ""
        said = f"{faults[0]}{more}" if faults else " ".join(str(error).split())[:200]
        of = f"of {model} " if isinstance(model, (str, Path)) else ""
        raise ModelError(f"The weights {of}do not fit the recipe's module: {said}; give those of its own.") from error
    if isinstance(model, nn.Module):
        _compare(model, own.eval(), trainer)
    return own.eval()


def bare(model: nn.Module, own: nn.Module) -> nn.Module:
    """The module that DataParallel or torch.compile was given, where the recipe's own has nothing around it."""
    for wrapper in WRAPPERS * 2:
        theirs, ours = ([name.startswith(wrapper) for name in part.state_dict()] for part in (model, own))
        if theirs and all(theirs) and not any(ours):
            model = model.get_submodule(wrapper[:-1])
    return model


def answered(model: Model, trainer: Trainer) -> np.ndarray:
    """Logits (n_points, n_classes) of a model at a trainer's points, training points first.

    Raises what `loaded` does, and ModelError where one is NaN or infinite.
    """
    logits = initialise(lambda: loaded(model, trainer), [0], trainer.device).logits(trainer.x).numpy()[0]
    if not np.isfinite(logits).all():
        raise ModelError("The model answers NaN or infinity; give one whose training went well.")
    return logits


def _compare(model: nn.Module, own: nn.Module, trainer: Trainer) -> None:
    """Raise ModelError where a module answers a few points otherwise than the recipe's with the same state."""
    answers, x = [], trainer.x[:FEW]
    kind = max((p.dtype for p in own.parameters()), key=lambda dtype: dtype.itemsize)
    try:
        for part in (copied(model).to(trainer.device, kind).eval(), copied(own)):
            with torch.no_grad(), drawing(0, trainer.device):
                answers.append(part(x.clone()))
        near = SAME * float(answers[1].nan_to_num().abs().max())
        same = torch.allclose(answers[0], answers[1], rtol=SAME, atol=near, equal_nan=True)
    except Exception as error:
        raise ModelError(f"The model fails on the recipe's points ({' '.join(str(error).split()):.200}).") from error
    if not same:
        raise ModelError(
            "The model answers otherwise than the recipe's module with the same weights: a constant or a buffer that "
            "is not among them differs; let the recipe make it as it is."
        )


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise StoreError(f"{path} {what}; give a .safetensors or .pt file of a model's state.")
    try:
        with path.open("rb") as file:  # length of its header, then the header, as JSON
            packed = file.read(9)[8:] == b"{"
        if packed or path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        said = " ".join(str(error).split())
        raise StoreError(f"{path} cannot be read as a model's state ({said:.200}); save model.state_dict().") from error
    except Exception as error:  # torch's unpickler refuses objects by an error of pickle's
        raise StoreError(f"{path} holds more than weights; save model.state_dict(), best as .safetensors.") from error
    if not isinstance(found, Mapping):
        raise StoreError(f"{path} holds a {type(found).__name__}; save model.state_dict().")
    return found


def with_weights(model: nn.Module, moved: Ensemble) -> nn.Module:
    """The module with the weights of the only model of an ensemble, in evaluation mode."""
    params, buffers = moved.state_of(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_((params | buffers)[name])
    return model.eval()
