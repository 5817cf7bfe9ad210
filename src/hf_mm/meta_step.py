"""A training step without memory or arithmetic: the real model on the meta device, its allocations and FLOPs counted.

Integers stay real, since the model looks at them: where the patches are, which positions have a target. Whatever meets
a tensor of the meta device becomes one. What a plan makes of the numbers is in `training_plan.py`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AutoModelForMultimodalLM, PreTrainedConfig


BLOCKED_ATTENTION = "meta_blocked"
IMAGE_SHARE = 0.5  # of the tokens of a window. Source: Transfusion (arXiv 2408.11039), section 4.1

# What autocast computes in the low precision and what in float32, of what the models call.
LOW_PRECISION = ("linear", "conv2d")
FULL_PRECISION = ("layer_norm", "group_norm", "cross_entropy")


class AllocationTracker(TorchDispatchMode):
    """Adds up the bytes of tensors that are made while it is on, as long as they live; `peak` is the most there were.

    Tensors that were there before count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._notice(leaf.untyped_storage(), known)
        return result

    def _notice(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in known:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class MetaAutocast:
    """Does to tensors of the meta device what `torch.autocast` does to those of a GPU: for meta there is none.

    Replaces functions of `torch.nn.functional` for the length of a `with` block. A mode for torch functions would be
    off during the backward pass, where layers are computed again.

    Args:
        dtype (`torch.dtype`): The low precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.keeps_weights = dtype, True
        self._weights: dict[int, torch.Tensor] = {}
        self._plain = {name: vars(F)[name] for name in (*LOW_PRECISION, *FULL_PRECISION)}

    def __enter__(self) -> "MetaAutocast":
        for name, function in self._plain.items():
            setattr(F, name, self._wrap(function, self._lower if name in LOW_PRECISION else _raise))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._plain.items():
            setattr(F, name, function)

    def end_forward(self) -> None:
        """Forgets the copies of weights, as leaving autocast does; what the backward pass needs it holds itself."""
        self._weights, self.keeps_weights = {}, False

    def _wrap(self, function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(cast, (args, kwargs))
            return function(*args, **kwargs)

        return wrapped

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and self.keeps_weights):
            return value.to(self.dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(self.dtype)
        return self._weights[id(value)]


class _BlockedAttention(torch.autograd.Function):
    """Attention in blocks: keeps queries, keys, values, the result and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend_blocked(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """Stands for SDPA on a GPU, and for FlexAttention."""
    return _BlockedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and not value.is_meta else value


def _raise(value: Any) -> Any:
    is_low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value


def build_meta_model(config: PreTrainedConfig) -> Any:
    """Builds the real model of a configuration without its weights, ready to train.

    Args:
        config (`PreTrainedConfig`): Of either family.

    Returns:
        `PreTrainedModel`: on the meta device.
    """
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    return model.train()


def fill_windows(config: PreTrainedConfig, num_windows: int, window_length: int) -> dict[str, torch.Tensor]:
    """Makes a batch of full windows, half of whose positions are pictures where the family tells them from text.

    Args:
        config (`PreTrainedConfig`): Of the model.
        num_windows (`int`): Rows.
        window_length (`int`): Positions of each.

    Returns:
        `dict[str, torch.Tensor]`: for `forward`; floats are of the meta device.
    """
    length = window_length
    input_ids = torch.full((num_windows, length), 7)
    labels = input_ids.clone()
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(length).expand(num_windows, -1)}
    # The mask of a packed window, as SDPA gets it.
    batch["attention_mask"] = torch.empty(num_windows, 1, length, length, dtype=torch.bool, device="meta")
    if config.model_type != "transfusion":
        return batch
    side = config.image_size // config.vae_stride
    patches = (side // config.patch_size) ** 2
    num_images = max(min(round(length * IMAGE_SHARE / patches), (length - 1) // (patches + 2)), 0)
    for image in range(num_images):
        start = 1 + image * (patches + 2)
        input_ids[:, start : start + patches] = config.image_token_id
        labels[:, start : start + patches] = -100
    if num_images:
        shape = (num_windows * num_images, config.latent_channels, side, side)
        batch["latents"], batch["noise"] = (torch.empty(shape, device="meta") for _ in range(2))
        batch["timesteps"] = torch.full((len(batch["latents"]),), 5)
    return batch


def measure_activations(
    model: Any,
    num_windows: int,
    window_length: int,
    *,
    autocast_dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
) -> int:
    """Counts the bytes that one forward and backward pass needs at its worst moment, beside weights and gradients.

    What counts are tensors: activations kept for the backward pass, copies of weights in the low precision,
    temporaries, inputs left aside. Attention is computed in blocks.

    Args:
        model (`PreTrainedModel`): On the meta device; in the precision that its weights are computed with.
        num_windows (`int`): Rows of a batch.
        window_length (`int`): Positions of a row.
        autocast_dtype (`torch.dtype`, *optional*): Low precision; none: that of the weights.
        gradient_checkpointing (`bool`, defaults to `False`): Whether layers are computed again.

    Returns:
        `int`: bytes.
    """
    AttentionInterface.register(BLOCKED_ATTENTION, _attend_blocked)
    for part in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        part._attn_implementation = BLOCKED_ATTENTION
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    for weight in model.parameters():  # as in every micro-batch but a step's first
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    batch = fill_windows(model.config, num_windows, window_length)
    tracker = AllocationTracker()
    with tracker:
        _step(model, batch, autocast_dtype)
    return tracker.peak


def _step(model: Any, batch: dict[str, torch.Tensor], autocast_dtype: torch.dtype | None) -> None:
    """Runs forward and backward."""
    if autocast_dtype is None:
        model(**batch, use_cache=False).loss.backward()
        return
    with MetaAutocast(autocast_dtype) as autocast:
        loss = model(**batch, use_cache=False).loss
        autocast.end_forward()
        loss.backward()


def measure_flops(model: Any, window_length: int, count_flops: Callable[[Callable[[], Any]], int]) -> int:
    """Counts the FLOPs of the forward and backward pass of one window, without recomputation.

    Args:
        model (`PreTrainedModel`): On the meta device.
        window_length (`int`): Positions.
        count_flops (`Callable`): Counts what a call runs.

    Returns:
        `int`: FLOPs, with what the mask hides.
    """
    for part in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        part._attn_implementation = "eager"
    model.activation_checkpointing_disable()
    batch = fill_windows(model.config, 1, window_length)
    batch["attention_mask"] = torch.empty(batch["attention_mask"].shape, device="meta")  # eager adds it
    with AllocationTracker():
        return count_flops(lambda: _step(model, batch, None))
