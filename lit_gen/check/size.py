"""How large a training is, found from shapes alone: no weights are read, nothing is computed.

* Parameters: the model is built with parameters that have a shape but no memory, pretrained parts from their configs.
* Weights, gradients and averages: their bytes, in the precision that they are kept in.
* Optimizer: the state that one step of the method's own optimizer leaves for a parameter, times the parameters.
* Activations: what autograd keeps for the backward pass of one training step on a batch of the real shapes.

What CUDA, the libraries' workspaces and the backward pass itself take comes on top; a few GB, or a tenth, is usual,
and more where activations are computed again. A compiled network keeps fewer of them than is told here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from huggingface_hub import constants
from jsonargparse import ArgumentParser
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

HALVES = ("bf16-mixed", "16-mixed", "bf16-true", "16-true")


@dataclass
class Size:
    """Size of a training on one device, in bytes but for the counts of parameters.

    Args:
        trainable: parameters that are trained.
        frozen: all others.
        weights: of both.
        gradients: of the trainable ones.
        optimizer: its state.
        optimizers: how many there are; None where the model does not say without a trainer.
        stored: what of the weights goes into a checkpoint.
        activations: kept for the backward pass; None where it could not be found.
    """

    trainable: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    optimizers: int | None
    stored: int
    activations: int | None = None


@contextmanager
def outlines() -> Iterator[None]:
    """Within, parameters have shapes but no memory, and pretrained parts are built from their configs."""
    import diffusers
    import transformers

    register, load = nn.Module.register_parameter, nn.Module.load_state_dict
    fillers = {n: f for n, f in vars(nn.init).items() if n.endswith("_") and callable(f) and not n.startswith("_")}
    parents = (transformers.PreTrainedModel, diffusers.ModelMixin)
    loaders = [parent.__dict__["from_pretrained"] for parent in parents]

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    def of_transformers(cls: Any, root: str, *_: Any, subfolder: str = "", dtype: Any = None, **__: Any) -> nn.Module:
        _require_weights(Path(root) / subfolder)
        return cls._from_config(cls.config_class.from_pretrained(root, subfolder=subfolder)).to(dtype or torch.float32)

    def of_diffusers(
        cls: Any, root: str, *_: Any, subfolder: str | None = None, torch_dtype: Any = None, **__: Any
    ) -> nn.Module:
        _require_weights(Path(root) / (subfolder or ""))
        return cls.from_config(cls.load_config(root, subfolder=subfolder)).to(torch_dtype or torch.float32)

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # finding out must not download anything
    nn.Module.register_parameter = registered
    nn.Module.load_state_dict = lambda module, *_, **__: load(module, {}, strict=False)
    transformers.PreTrainedModel.from_pretrained = classmethod(of_transformers)
    diffusers.ModelMixin.from_pretrained = classmethod(of_diffusers)
    for name in fillers:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        nn.Module.register_parameter, nn.Module.load_state_dict = register, load
        for parent, loader in zip(parents, loaders, strict=True):
            parent.from_pretrained = loader
        for name, filler in fillers.items():
            setattr(nn.init, name, filler)


def _require_weights(folder: Path) -> None:
    """The weights that are not read must at least be there."""
    files = list(folder.glob("*.safetensors"))
    if folder.is_dir() and not files:
        raise OSError(f"{folder} has no .safetensors file")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            pointer = file.read_bytes()[:7] == b"version"
            told = "a pointer of Git LFS, not the weights: run git lfs pull" if pointer else f"damaged ({error})"
            raise OSError(f"{file}: {told}") from error


def build(kind: Any, settings: Any) -> Any:
    """An instance of what bound settings ({"class_path", "init_args"}, or a list of them) describe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    return parser.instantiate(parser.parse_object({"x": settings})).x


def outline(settings: dict[str, Any]) -> L.LightningModule:
    """The model of bound settings without the memory of its weights; raises what its constructor raises."""
    with outlines():
        return build(L.LightningModule, settings)


def measure(model: L.LightningModule, max_steps: int, precision: str) -> Size:
    """The size of the training of an outlined model, activations apart."""
    weights = list(model.parameters())
    trained = [w for w in weights if w.requires_grad]
    half = 2 if str(precision).endswith("-true") and str(precision) in HALVES else 0

    def size(tensors: list[Tensor]) -> int:
        return sum(t.numel() * (half or t.element_size()) for t in tensors)

    optimizers = _optimizers(model, max_steps)
    state = 0
    for optimizer in optimizers or ():
        each = _state_per_parameter(optimizer)
        state += sum(int(each * size([w])) for group in optimizer.param_groups for w in group["params"])
    return Size(
        trainable=sum(w.numel() for w in trained),
        frozen=sum(w.numel() for w in weights if not w.requires_grad),
        weights=size(weights),
        gradients=size(trained),
        optimizer=state if optimizers is not None else 2 * size(trained),  # Adam's
        optimizers=None if optimizers is None else len(optimizers),
        stored=size(list(model.state_dict().values())),
    )


def activations(model: L.LightningModule, batch: Any, precision: str) -> int:
    """Bytes that autograd keeps of one training step; raises whatever a step on shapes alone cannot do."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _numbers_of_shapes():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    shape = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = nn.Parameter(shape, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        shapes = tree_map(lambda v: fake.from_tensor(v) if isinstance(v, Tensor) else v, batch)
        own = {w.untyped_storage()._cdata for w in model.parameters()}
        half = torch.autocast("cpu", torch.bfloat16) if str(precision) in HALVES else nullcontext()
        model.train()
        with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.training_step(shapes, 0)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@contextmanager
def _numbers_of_shapes() -> Iterator[None]:
    """Within, tensors without values say that they are zero; where a crop begins, say, does not change a size."""
    item = Tensor.item

    def zero(tensor: Tensor) -> bool | int | float:
        if not isinstance(tensor, FakeTensor):
            return item(tensor)
        return 0.0 if tensor.is_floating_point() else 0

    Tensor.item = zero  # which `tolist` goes by, too
    try:
        yield
    finally:
        Tensor.item = item


def _optimizers(model: L.LightningModule, max_steps: int) -> list[torch.optim.Optimizer] | None:
    """The optimizers of a model, which may ask its trainer how long it will train."""
    model._trainer = SimpleNamespace(max_steps=max_steps, estimated_stepping_batches=max_steps, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.configure_optimizers()
    except Exception:  # anything that it wants of a real trainer
        return None
    finally:
        model._trainer = None
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        found = found[0]
    each = found if isinstance(found, list | tuple) else [found]
    each = [f["optimizer"] if isinstance(f, dict) else f for f in each]
    return [f for f in each if isinstance(f, torch.optim.Optimizer)]


def _state_per_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Size of the state of a parameter, in sizes of the parameter; of a plain one of 8 x 8 numbers."""
    weight = nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.zeros(8, 8)
    try:
        probe = type(optimizer)([weight], **{**optimizer.defaults, "fused": None, "foreach": None})
        probe.step()
    except Exception:  # an optimizer with other ways
        return 2.0
    numbers = sum(v.numel() for v in probe.state[weight].values() if isinstance(v, Tensor) and v.ndim)
    return numbers / weight.numel()
