"""The optimizer, its learning-rate schedule and the moving average of the weights.

Knows parameters and a recipe. Does not know what the model computes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from .recipe import TrainingRecipe


# Positions up to which matrix products beat the CPU's fused attention in bf16: 4 times at 86, as fast at 256.
SHORT_WINDOW = 320


class TrainingParts(NamedTuple):
    """What a run trains: the prepared model and optimizer, the schedule, and the moving average (or None)."""

    model: nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None


def prepare_training(accelerator: Accelerator, model: nn.Module, recipe: TrainingRecipe) -> TrainingParts:
    """Builds optimizer, schedule and moving average for a model, and places all of them on the devices.

    The schedule is not prepared by accelerate: a prepared one advances once per process instead of once per step.

    Args:
        accelerator (`Accelerator`): From `build_accelerator`.
        model (`nn.Module`): Frozen parameters (`requires_grad=False`) get no optimizer state. It becomes float32 where
            trained ones are not; `mixed_precision` is what it computes in.
        recipe (`TrainingRecipe`): The run.

    Returns:
        `TrainingParts`: To be given to `train` and `Checkpoints`.

    Raises:
        ValueError: If nothing is trainable, or `gradient_checkpointing` is asked of a model without support for it.

    """
    if recipe.gradient_checkpointing:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"`gradient_checkpointing`=True, but {type(model).__name__} has no support. Set it to false."
            )
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if any(weight.requires_grad and weight.dtype != torch.float32 for weight in model.parameters()):
        model.float()  # most steps of AdamW change a weight by less than bfloat16 tells apart
    set_attention(accelerator, model, recipe)
    if recipe.torch_compile:
        # DDP cuts the graph at its buckets of gradients by default, and batches of varying length then do not compile.
        torch._dynamo.config.optimize_ddp = False
        model.compile()  # in place: the names in the state dict stay as they are
    optimizer = build_optimizer(model, recipe)
    lr_scheduler = build_lr_scheduler(optimizer, recipe)
    prepared_model, prepared_optimizer = _place(accelerator, model, optimizer)
    return TrainingParts(prepared_model, prepared_optimizer, lr_scheduler, build_ema(prepared_model, recipe))


def _place(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Places model and optimizer on the devices, under FSDP2 in shards.

    Layers are sharded that the model's class names, of those that it has: an instance names those of its parts too,
    and accelerate refuses a name without a layer, as a VAE has. What a process did not use in a step, its patch layers
    where no document had an image, adds zeros to the gradients of the others: without them it would send fewer numbers
    than they expect. (Unlike elsewhere a layer that no process used then still moves, by its moments and its decay.)
    """
    sharding = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharding and any(hasattr(part, "held_rows") for part in model.parameters()):
        raise ValueError(
            f"`trains_code_embeddings`=False holds rows of a matrix, which {accelerator.distributed_type.value} would "
            "train. Train under DDP, or set it to true."
        )
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        held = {type(part).__name__ for part in model.modules()}
        names = getattr(type(model), "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in names if name in held]
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    prepared_model.set_reduce_scatter_unused_params(True)
    return prepared_model, prepared_optimizer


def set_attention(accelerator: Accelerator, model: nn.Module, recipe: TrainingRecipe) -> None:
    """Sets the attention that a run trains with, by `attn_implementation`.

    `auto` is `eager` for bf16 on a CPU where the model reads `SHORT_WINDOW` positions at most: the backward pass of
    PyTorch's fused kernel takes four times as long there. Else the model keeps its own.

    Args:
        accelerator (`Accelerator`): Knows device and precision.
        model (`nn.Module`): The model, before `accelerator.prepare`: one of transformers, or what holds one.
        recipe (`TrainingRecipe`): The run.

    Raises:
        ValueError: If the name is none that the model has, or it has no choice.
    """
    attending = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if recipe.attn_implementation != "auto":
        if attending is None:
            raise ValueError(
                f"`attn_implementation`={recipe.attn_implementation!r}, but {type(model).__name__} has no choice. "
                "Leave it at auto."
            )
        attending.set_attn_implementation(recipe.attn_implementation)
    elif attending is not None and accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        longest = getattr(attending.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and longest <= SHORT_WINDOW:
            attending.set_attn_implementation("eager")


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Lists the parameters that training changes, in the model's order.

    Args:
        model (`nn.Module`): Any module, prepared or not.

    Returns:
        `list[nn.Parameter]`: Those with `requires_grad`.

    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def hold_rows(weight: nn.Parameter, rows: slice) -> None:
    """Keeps rows of a matrix, such as some of the embeddings, as they are while its others are trained.

    Args:
        weight (`nn.Parameter`): Of a model that is not prepared yet. All of it goes without weight decay.
        rows (`slice`): Of its first axis, with a start and a stop.

    """

    def forget(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()  # autograd forbids to change what it hands out
        gradient[rows] = 0  # with which AdamW moves nothing
        return gradient

    weight.held_rows = rows
    weight.register_hook(forget)


def build_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """Builds a fused AdamW over the trainable parameters, with weight decay on matrices only.

    Args:
        model (`nn.Module`): The model, before `accelerator.prepare`.
        recipe (`TrainingRecipe`): Gives learning rate, betas, epsilon and weight decay.

    Returns:
        `torch.optim.AdamW`: Two parameter groups, with decay (two dimensions or more, but not of norms, and without
            held rows) and without.

    Raises:
        ValueError: If no parameter is trainable.

    Source: Transfusion (arXiv 2408.11039), Sec. 4.1, for the values. Differs: the paper names no exception from
    weight decay; here gains and biases have none, because decay would pull the gain of a norm to 0.

    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameter. Set `requires_grad` on what to train.")
    # Chameleon's norms of queries and keys have a gain for each head.
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    spared = {id(gain) for norm in norms for gain in norm.parameters()}
    spared |= {id(p) for p in parameters if p.ndim < 2 or hasattr(p, "held_rows")}
    groups = [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )


def build_lr_scheduler(optimizer: torch.optim.Optimizer, recipe: TrainingRecipe) -> LRScheduler:
    """Builds the schedule: linear warm-up from 0, then cosine or linear to the floor, or constant.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer itself, not the one that accelerate wraps.
        recipe (`TrainingRecipe`): Gives type, warm-up, length and floor.

    Returns:
        `LRScheduler`: To be advanced once per optimizer step.

    """
    if recipe.lr_scheduler_type == "cosine":
        name, kwargs = "cosine_with_min_lr", {"min_lr": recipe.min_learning_rate}
    elif recipe.lr_scheduler_type == "linear":  # what the library calls linear has no floor
        name, kwargs = "polynomial", {"lr_end": recipe.min_learning_rate, "power": 1.0}
    else:
        name, kwargs = recipe.lr_scheduler_type, {}
    return get_scheduler(name, optimizer, recipe.warmup_steps, recipe.max_steps, scheduler_specific_kwargs=kwargs)


def build_ema(model: nn.Module, recipe: TrainingRecipe) -> EMAModel | None:
    """Builds the moving average of the trainable weights, or None when `ema_decay` is None.

    The decay warms up as `(1 + step) / (10 + step)`, so that early averages forget the random start.

    Args:
        model (`nn.Module`): The prepared model.
        recipe (`TrainingRecipe`): Gives `ema_decay`.

    Returns:
        `EMAModel` of diffusers, or None.

    """
    if recipe.ema_decay is None:
        return None
    parameters = trainable_parameters(model)
    is_on_cpu = parameters[0].device.type == "cpu"
    # On the CPU the foreach update takes 3.5 times as long: it writes a second copy of all weights.
    return EMAModel(parameters, decay=recipe.ema_decay, foreach=not is_on_cpu)


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Puts the averaged weights into the model for the length of a `with` block, and the trained ones back after it.

    Args:
        ema (`EMAModel` or None): With None the block runs on the weights as they are.
        parameters (`Iterable[nn.Parameter]`): The parameters that the average was built over, in the same order:
            `trainable_parameters(model)`.

    Yields:
        None.

    Raises:
        ValueError: If the parameters are not as many as those averaged.

    """
    if ema is None:
        yield
        return
    swapped = list(parameters)
    if len(swapped) != len(ema.shadow_params):
        raise ValueError(
            f"`parameters` has {len(swapped)} entries, but the average holds {len(ema.shadow_params)}. "
            "Pass `trainable_parameters(model)`."
        )
    ema.store(swapped)
    ema.copy_to(swapped)
    try:
        yield
    finally:
        ema.restore(swapped)
