"""DeepSpeed's ZeRO as a Lightning strategy that keeps what this project promises of any strategy."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from lit_gen.errors import UserError
from lit_gen.methods.base import Method
from lit_gen.scale import peers
from lit_gen.scale.buckets import LEAST
from lit_gen.scale.consolidate import FROZEN, NAMES, ORDERS, TAG, parts_of, read_part
from lit_gen.scale.ddp import share_buffers
from lit_gen.scale.layout import order_in_memory
from lit_gen.scale.reduction import ReductionByCollectives, ReductionByCopies, flattened_as_they_lie
from lit_gen.scale.shards import unshard
from lit_gen.weights import read_checkpoint, read_torch


class ZeRO(DeepSpeedStrategy):
    """Data parallelism whose optimizer state (and gradients, and weights) are divided among the processes.

    What is frozen stays whole on every device, in its own precision, and is not stored. Gradients are clipped over all
    processes at the method's `clip_norm`. Under "bf16-mixed", weights stay float32 and operations are cast as under
    DDP, and gradients are sent in bfloat16 between the processes; "bf16-true" casts everything, frozen parts included,
    over float32 master weights. Checkpoints are folders with a part per process: `export` makes one file of them, and
    every other command reads them as they are.

    Args:
        stage: what is divided: 1 the optimizer's state, 2 also gradients, 3 also the trained weights.
        offload: what is kept in the host's memory: "optimizer" its state, "all" (stage 3) the trained weights too.
        bucket: gradients, and weights, are sent this many numbers at a time; by default 25 million, and at stage 2
            without offload an eighth of all gradients if that is more.
        exchange: how numbers go between processes: by "collectives" (NCCL), or, at stage 2 without offload, by "copies"
            between the GPUs of one node, which leave the multiprocessors to what is computed meanwhile; "auto" takes
            these where they can be.
    """

    accelerators: tuple[type, ...] = (CUDAAccelerator,)

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: Literal["none", "optimizer", "all"] = "none",
        bucket: int | None = None,
        exchange: peers.Exchange = "auto",
    ) -> None:
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise UserError("the strategy ZeRO needs DeepSpeed: pip install 'deepspeed>=0.19.8,<0.20'") from None
        if offload == "all" and stage != 3:
            raise UserError(f"trainer.strategy: offload: all needs stage: 3, not {stage}, which leaves weights whole")
        if exchange == "copies" and (stage, offload) != (2, "none"):
            raise UserError("trainer.strategy: exchange: copies needs stage: 2 and offload: none")
        super().__init__(
            stage=stage,
            offload_optimizer=offload != "none",
            offload_parameters=offload == "all",
            pin_memory=offload != "none",
            reduce_bucket_size=bucket or LEAST,
            allgather_bucket_size=bucket or LEAST,
            # Below stage 3, DeepSpeed's "reduce-scatter" sums whole buckets as well, and copies them twice more.
            reduce_scatter=stage == 3,
            logging_batch_size_per_gpu=1,  # only DeepSpeed's own rate, which nobody reads, depends on it
            exclude_frozen_parameters=True,
        )
        self.stage, self.offload, self.bucket, self.exchange = stage, offload, bucket, exchange
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, offloaded too: DeepSpeed's needs a compiler
        self.config["timers"] = {"throughput": {"enabled": False}}  # it waits for the device in every step
        self._names: list[list[str]] = []
        self._orders: dict[str, list[int]] = {}

    # -- set-up -------------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        return self._precision_plugin or ZeROPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and plugin.precision.startswith("16"):
            raise UserError(f"trainer.precision: {plugin.precision} does not go with ZeRO; use bf16-mixed or 32-true")
        self._precision_plugin = None if plugin is None else ZeROPrecision(plugin.precision)

    @property
    def _reduces(self) -> bool:
        """Whether gradients are averaged by `lit_gen.scale.reduction` and not by DeepSpeed itself."""
        return self.stage == 2 and self.offload == "none" and self.precision_plugin.keeps_float32

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False  # Lightning's accumulation, as under DDP: also where an epoch ends in the middle of one

    def block_backward_sync(self) -> AbstractContextManager:
        return nullcontext()  # the precision tells the engine which batch is the last one of a step

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, self.accelerators):
            raise UserError("the strategy ZeRO needs NVIDIA GPUs; on CPUs use --trainer.strategy ddp")
        DDPStrategy.setup_environment(self)

    def _init_deepspeed_distributed(self) -> None:
        super()._init_deepspeed_distributed()
        atexit.register(_destroy_dist_connection)  # as Lightning does for its own; NCCL complains otherwise

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # nothing to divide without an optimizer
            return DDPStrategy.setup(self, trainer)
        refuse(self.lightning_module)
        if self.exchange == "copies" and not self._reduces:
            raise UserError("trainer.strategy: exchange: copies needs trainer.precision bf16-mixed or 32-true")
        self.model_to_device()  # optimizers choose their kernels by device
        super().setup(trainer)
        return None

    def init_deepspeed(self) -> None:
        self._initialize_deepspeed_train(self.model)

    def _format_config(self) -> None:
        module = self.lightning_module
        clip = module.optimizer_settings.clip_norm if isinstance(module, Method) else module.trainer.gradient_clip_val
        self.config["gradient_clipping"] = float(clip or 0)
        super()._format_config()
        if self.precision_plugin.mixed:
            del self.config["bf16"]
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        names = {id(p): n for n, p in model.named_parameters()}
        self._names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        _sync_module_states(model)
        weights = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        with _hidden_frozen(model), flattened_as_they_lie() if self._reduces else nullcontext():
            engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self._reduces:
            self._orders = {n: list(order_in_memory(p)) for n, p in weights.items() if not p.is_contiguous()}
            sent = torch.bfloat16 if self.precision_plugin.mixed else torch.float32
            copies = peers.by_copies(self.exchange, self.root_device, self.num_nodes)
            (ReductionByCopies if copies else ReductionByCollectives)(optimizer, sent, self.bucket)
        engine.checkpoint_engine = checkpoint_engine(engine)
        engine._copy_recovery_script = lambda path: None  # it would unpickle; `export` does not
        return engine, optimizer

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.model is not self.lightning_module and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            share_buffers(self.lightning_module)

    def teardown(self) -> None:
        if self.model is not None and self.model is not self.lightning_module:  # the module is an ordinary one again
            trainer = self.lightning_module.trainer
            # After an error other processes may be anywhere: waiting for them to bring their pieces would be for ever.
            cut = () if trainer.state.status is TrainerStatus.INTERRUPTED else self.model.parameters()
            pieces = {p: (p.ds_tensor.data, p.ds_shape) for p in cut if hasattr(p, "ds_tensor")}
            self.model.destroy()
            for hook in ("module_forward_pre_hook", "module_forward_post_hook"):  # which keep all of it in memory
                if (handle := getattr(self.model, hook, None)) is not None:
                    handle.remove()
            for weight, (piece, shape) in pieces.items():
                whole = unshard(piece.to(self.root_device), shape).cpu()
                for attribute in [a for a in vars(weight) if a.startswith("ds_")]:
                    delattr(weight, attribute)
                weight.data = whole
            self.model, self.optimizers, self.lr_scheduler_configs = self.lightning_module, [], []
        super().teardown()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {}  # the engine writes each process's part

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder; every process its part.

        Raises:
            OSError: a process could not write its part, e.g. for want of room; raised on every process.
        """
        trained = {name for group in self._names for name in group}
        frozen = {n: w for n, w in checkpoint["state_dict"].items() if n not in trained}
        client = {**checkpoint, FROZEN: frozen if self.is_global_zero else {}, NAMES: self._names, ORDERS: self._orders}
        engine = self.deepspeed_engine.checkpoint_engine
        engine.error = None
        super().save_checkpoint(client, filepath, storage_options)
        if not self.reduce_boolean_decision(engine.error is None):
            raise engine.error or OSError(f"{filepath}: another process could not write its part")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Continue from a folder of as many processes; without training, any checkpoint does.

        Raises:
            UserError: a file, or a folder of another number of processes or another stage.
        """
        path = Path(checkpoint_path)
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return read_checkpoint(path)
        if not path.is_dir():
            raise UserError(
                f"{path}: ZeRO continues only from what it saved itself; continue with another strategy, or start "
                "from its weights in another run (--experiment NAME --init_from FILE)"
            )
        if (count := len(parts_of(path, "optim"))) != self.world_size:
            raise UserError(
                f"{path}: was saved by {count} processes and ZeRO cannot divide it among {self.world_size} anew; "
                "continue on as many, or make one file of it (`export --format checkpoint`) for another strategy"
            )
        was_cut = parts_of(path, "model")[0].name.startswith("zero_pp_rank_")
        if was_cut != (self.stage == 3):
            raise UserError(
                f"{path}: was saved at stage {'3' if was_cut else '1 or 2'}, and this is stage {self.stage}; continue "
                "at that one, or make one file of it (`export --format checkpoint`) for another strategy"
            )
        _, client = self.deepspeed_engine.load_checkpoint(
            str(path), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if not self.is_global_zero:
            client[FROZEN] = read_part(parts_of(path, "model")[0])[FROZEN]
        if client.pop(ORDERS, {}) != self._orders:
            raise UserError(
                f"{path}: its weights lie in memory in another order; continue with the same model.channels_last, "
                "stage and offload, or make one file of it (`export --format checkpoint`) for another strategy"
            )
        client["state_dict"] = client.pop(FROZEN)
        self.lightning_module.load_state_dict(client["state_dict"], strict=False)
        return client

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)


class ZeROPrecision(DeepSpeedPrecision):
    """Lightning's, but mixed precision leaves the weights as they are and casts operations, as under DDP."""

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        self.mixed = precision == "bf16-mixed"
        if self.mixed:
            self._desired_dtype = torch.float32
        self.keeps_float32 = self._desired_dtype == torch.float32

    def forward_context(self) -> AbstractContextManager:
        if not self.mixed:
            return super().forward_context()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, dtype=torch.bfloat16)

    def backward(self, tensor: Tensor, model: L.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        engine = model.trainer.model
        engine.set_gradient_accumulation_boundary(not model.trainer.fit_loop._should_accumulate())
        engine.backward(tensor, *args, scale_wrt_gas=False, **kwargs)  # Lightning has divided by the batches already


def refuse(module: L.LightningModule) -> None:
    """Refuse a method that cannot run under ZeRO.

    Raises:
        UserError: one sentence that says why.
    """
    if isinstance(module, Method) and module.refuses_zero:
        raise UserError(
            f"{type(module).__name__} cannot run under DeepSpeed: {module.refuses_zero}; use --trainer.strategy ddp"
        )


def refuse_other(strategy: Strategy) -> None:
    """Refuse Lightning's own DeepSpeed strategy, which unpickles checkpoints and loses averages and clipping.

    Raises:
        UserError: one sentence that says what to take instead.
    """
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeRO):
        raise UserError("trainer.strategy: for DeepSpeed use lit_gen.scale.zero.ZeRO, as scale/deepspeed.yaml does")


@contextmanager
def _hidden_frozen(model: nn.Module) -> Iterator[None]:
    """Keep frozen parameters from DeepSpeed while it sets up; ZeRO-3 would divide them."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    whole = [m for m in model.modules() if any(not p.requires_grad for p in m.parameters(recurse=False))]
    before = [(module, dict(module._parameters)) for module in whole]
    for module in model.modules():
        # ZeRO-3 hooks into every module down to such leaves, which costs more than a small module itself.
        module._z3_leaf = not any(p.requires_grad for p in module.parameters())
    for module, weights in before:
        for name, weight in weights.items():
            if weight is not None and not weight.requires_grad:
                module._buffers[name] = module._parameters.pop(name)
    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda _: None  # it cannot send scalars, nor channels_last; and they are equal
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
        for module, weights in before:
            for name in weights:
                module._buffers.pop(name, None)
            module._parameters.clear()  # and not just put back: the order is that of the optimizer and of checkpoints
            module._parameters.update(weights)
    every = coordinator.get_all_parameters
    if every.__name__ != "divided_parameters":  # ZeRO-3 takes every parameter that a module has for a divided one

        def divided_parameters(module: nn.Module, recurse: bool = False) -> list[tuple[str, nn.Parameter]]:
            return [(name, weight) for name, weight in every(module, recurse) if hasattr(weight, "ds_id")]

        coordinator.get_all_parameters = divided_parameters


def checkpoint_engine(engine: Any) -> Any:
    """What an engine of DeepSpeed writes its checkpoints with, in a way that fits this project."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class CheckpointEngine(TorchCheckpointEngine):
        """Flushes what it writes, and loads tensors and plain values, never code."""

        error: OSError | None = None

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            part = state_dict.get("optimizer_state_dict") or {}
            if "single_partition_of_fp32_groups" in part:  # pieces of the flat weights, all of which would be written
                groups = part["single_partition_of_fp32_groups"]
                part["single_partition_of_fp32_groups"] = [group.detach().to("cpu", copy=True) for group in groups]
            try:
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:  # torch makes the second of the first
                self.error = error if isinstance(error, OSError) else OSError("writing failed")
                # Not raised here: the other processes wait in a barrier, and all must come to it.

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
                return read_torch(path, map_location)

    return CheckpointEngine(engine._config)


# Lightning's names for DeepSpeed mean this strategy.
for _name, _settings in {
    "deepspeed": {},
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {},
    "deepspeed_stage_2_offload": {"offload": "optimizer"},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {"stage": 3, "offload": "all"},
}.items():
    StrategyRegistry.register(_name, ZeRO, description=ZeRO.__doc__.splitlines()[0], override=True, **_settings)
StrategyRegistry.remove("deepspeed_stage_3_offload_nvme")
