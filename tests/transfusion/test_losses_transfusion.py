import pytest
import torch

from hf_mm.transfusion import objective_transfusion


def make_batch(config):
    ids = torch.tensor([[1, 7, 8, 9, 10, 11, 12, 13], [1, 17, 18, 19, 20, 2, 0, 0]])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "position_ids": torch.arange(8).expand(2, -1)}


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_do_not_depend_on_how_many_scores_are_held(make_model, monkeypatch, autocast):
    model = make_model().train()
    batch, vocab_size, sizes, found = make_batch(model.config), model.config.text_config.vocab_size, [], []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    num_targets = int(model.count_targets(batch)["num_items_in_batch"])
    assert num_targets == 12
    for held in (1000, 5, 1, 0.3):
        monkeypatch.setattr(objective_transfusion, "MAX_SCORES", int(held * vocab_size))
        model.zero_grad()
        sizes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        (3 * loss).backward()
        assert sum(sizes) == num_targets  # none is scored a second time in the backward pass
        assert max(sizes) == min(num_targets, max(1, int(held)))
        found.append((loss.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]))
    expected, gradients = found[0]
    for loss, others in found[1:]:
        torch.testing.assert_close(loss, expected)
        for other, gradient in zip(others, gradients, strict=True):
            assert (other - gradient).abs().max() <= (5e-2 if autocast else 1e-5) * gradient.abs().max()


def test_a_loss_in_pieces_without_gradients_is_the_same(make_model, monkeypatch):
    model = make_model().train()
    batch = make_batch(model.config)
    expected = model(**batch).loss
    monkeypatch.setattr(objective_transfusion, "MAX_SCORES", 2 * model.config.text_config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, expected)


def test_a_frozen_output_layer_gets_no_gradient(make_model, monkeypatch):
    model = make_model().train()
    model.lm_head.requires_grad_(False)
    batch = make_batch(model.config)
    monkeypatch.setattr(objective_transfusion, "MAX_SCORES", 2 * model.config.text_config.vocab_size)
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.language_model.norm.weight.grad.any()
    model.lm_head.requires_grad_(True)
