from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_mm.training import optimization
from hf_mm.training.optimization import (
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    ema_weights,
    hold_rows,
    prepare_training,
    set_attention,
    trainable_parameters,
)
from hf_mm.training.recipe import TrainingRecipe


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    model[2].requires_grad_(False)
    return model


def rates(recipe: TrainingRecipe, num_steps: int) -> list[float]:
    optimizer = build_optimizer(make_model(), recipe)
    scheduler = build_lr_scheduler(optimizer, recipe)
    seen = []
    for _ in range(num_steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_only_trainable_matrices_decay() -> None:
    model = make_model()
    optimizer = build_optimizer(model, TrainingRecipe(weight_decay=0.3))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_norms_with_a_gain_for_each_head_do_not_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6, bias=False), "norm": nn.LayerNorm((2, 3))})
    decayed, plain = build_optimizer(model, TrainingRecipe(weight_decay=0.3)).param_groups
    assert [tuple(weight.shape) for weight in decayed["params"]] == [(6, 6)]
    assert [tuple(weight.shape) for weight in plain["params"]] == [(2, 3), (2, 3)]


def test_held_rows_stay_while_the_others_are_trained() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4)
    before = embedding.weight.detach().clone()
    hold_rows(embedding.weight, slice(2, 5))
    optimizer = build_optimizer(embedding, TrainingRecipe(weight_decay=0.3, learning_rate=0.1))
    for _ in range(3):
        embedding(torch.arange(6)).square().sum().backward()
        assert embedding.weight.grad[2:5].count_nonzero() == 0  # so that they count in no norm either
        optimizer.step()
    assert torch.equal(embedding.weight[2:5], before[2:5])
    assert (embedding.weight != before)[[0, 1, 5]].all()


def test_held_rows_are_refused_where_they_would_be_trained() -> None:
    model = nn.Linear(2, 2)
    hold_rows(model.weight, slice(0, 1))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        sharding = SimpleNamespace(distributed_type=kind, is_fsdp2=False)
        with pytest.raises(ValueError, match=f"holds rows of a matrix, which {kind.value} would train"):
            optimization._place(sharding, model, None)


def test_layers_are_sharded_that_a_model_names_and_has() -> None:
    class Choosing(nn.Sequential):
        _no_split_modules = ["Linear", "ConvTranspose3d"]

        def set_reduce_scatter_unused_params(self, reduces: bool) -> None:
            self.reduces = reduces

    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=True,
        state=SimpleNamespace(fsdp_plugin=plugin),
        prepare=lambda *parts: parts,
    )
    model = Choosing(nn.Linear(2, 2))
    optimization._place(accelerator, model, build_optimizer(model, TrainingRecipe()))
    assert plugin.transformer_cls_names_to_wrap == ["Linear"] and model.reduces


def test_cosine_warms_up_and_ends_at_the_floor() -> None:
    recipe = TrainingRecipe(learning_rate=3e-4, min_learning_rate=1.5e-5, warmup_steps=10, max_steps=110)
    seen = rates(recipe, 112)
    assert seen[0] == 0 and seen[5] == pytest.approx(1.5e-4) and seen[10] == pytest.approx(3e-4)
    assert seen[60] == pytest.approx((3e-4 + 1.5e-5) / 2)
    assert seen[110] == pytest.approx(1.5e-5) and min(seen[10:]) == pytest.approx(1.5e-5)


@pytest.mark.parametrize(("kind", "last"), [("linear", 0.0), ("constant_with_warmup", 1e-3)])
def test_other_schedules(kind: str, last: float) -> None:
    recipe = TrainingRecipe(learning_rate=1e-3, lr_scheduler_type=kind, warmup_steps=2, max_steps=7)
    assert rates(recipe, 8)[7] == pytest.approx(last)


def test_linear_ends_at_the_floor_too() -> None:
    recipe = TrainingRecipe(
        learning_rate=6e-4, min_learning_rate=6e-5, lr_scheduler_type="linear", warmup_steps=10, max_steps=110
    )
    seen = rates(recipe, 112)
    assert seen[5] == pytest.approx(3e-4) and seen[10] == pytest.approx(6e-4) and seen[60] == pytest.approx(3.3e-4)
    assert seen[110] == seen[111] == pytest.approx(6e-5)


def test_ema_weights_are_swapped_in_and_back_even_after_an_error() -> None:
    model = make_model()
    ema = build_ema(model, TrainingRecipe(ema_decay=0.5))
    trained = [p.detach().clone() for p in model.parameters()]
    average = [torch.full_like(p, 0.25) for p in ema.shadow_params]
    ema.shadow_params = [p.clone() for p in average]
    with pytest.raises(KeyError), ema_weights(ema, trainable_parameters(model)):
        inside = trainable_parameters(model)
        assert all(torch.equal(p, q) for p, q in zip(inside, average, strict=True))
        raise KeyError("inside")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained, strict=True))


def test_ema_weights_refuses_other_parameters() -> None:
    model = make_model()
    ema = build_ema(model, TrainingRecipe(ema_decay=0.5))
    with pytest.raises(ValueError, match="6 entries, but the average holds 4"), ema_weights(ema, model.parameters()):
        pass


def test_without_ema_the_weights_stay() -> None:
    model = make_model()
    assert build_ema(model, TrainingRecipe()) is None
    with ema_weights(None, model.parameters()):
        pass


@pytest.mark.parametrize("is_frozen", [False, True])
def test_weights_stored_in_bfloat16_are_trained_in_float32(is_frozen: bool) -> None:
    model = make_model().bfloat16()
    if is_frozen:  # as a base beneath adapters is
        model.requires_grad_(False)
        model.append(nn.Linear(2, 2))
    recipe = TrainingRecipe(output_dir="run", max_steps=4, learning_rate=1e-5, warmup_steps=0, mixed_precision="no")
    parts = prepare_training(Accelerator(cpu=True), model, recipe)
    assert model[0].weight.dtype is (torch.bfloat16 if is_frozen else torch.float32)
    before = [weight.detach().clone() for weight in trainable_parameters(model)]
    for weight in trainable_parameters(model):
        weight.grad = torch.ones_like(weight)
    parts.optimizer.step()
    assert all((now != then).all() for now, then in zip(trainable_parameters(model), before, strict=True))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(make_model().requires_grad_(False), TrainingRecipe())
    with pytest.raises(ValueError, match="`gradient_checkpointing`=True, but Sequential"):
        prepare_training(Accelerator(cpu=True), make_model(), TrainingRecipe(gradient_checkpointing=True))


def make_llama(max_position_embeddings: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=max_position_embeddings,
        )
    )


@pytest.mark.parametrize(
    ("choice", "mixed_precision", "longest", "trained_with"),
    [
        ("auto", "bf16", 256, "eager"),
        ("auto", "bf16", 4096, "sdpa"),
        ("auto", "no", 256, "sdpa"),
        ("sdpa", "bf16", 256, "sdpa"),
        ("eager", "no", 4096, "eager"),
    ],
)
def test_short_bf16_windows_attend_by_matrix_products(
    choice: str, mixed_precision: str, longest: int, trained_with: str
) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = make_llama(longest)
    prepare_training(accelerator, nn.Sequential(model), TrainingRecipe(attn_implementation=choice))
    assert model.config._attn_implementation == trained_with


def test_attention_that_nothing_has_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="`attn_implementation`='eager', but Sequential has no choice"):
        set_attention(accelerator, make_model(), TrainingRecipe(attn_implementation="eager"))
    with pytest.raises(ValueError, match='`attn_implementation="fast"` is not supported'):
        prepare_training(accelerator, make_llama(256), TrainingRecipe(attn_implementation="fast"))
