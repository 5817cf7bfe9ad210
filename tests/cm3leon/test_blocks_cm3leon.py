import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, DynamicCache, StaticCache

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, modeling_cm3leon
from hf_mm.cm3leon.layout_cm3leon import shift_labels


CHAMELEON = {"decoder_block": "chameleon", "hidden_act": "silu", "tie_word_embeddings": False}
LENGTHS = (13, 29, 6, 17)
SHARED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"


@pytest.fixture(scope="module")
def make_chameleon(make_model):
    """Models whose norms are heard: gains and biases begin as ones and zeros."""

    def make(**fields):
        model = make_model(**{**CHAMELEON, **fields})
        generator = torch.Generator().manual_seed(5)
        for name, weight in model.named_parameters():
            if "norm" in name and "image_tokenizer" not in name:
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        return model

    return make


def rows_of(config, lengths=LENGTHS, seed=0):
    """Documents of text with a picture in each that is long enough."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        row = torch.randint(20, 90, (length,), generator=generator)
        if length > 20:
            codes = torch.randint(config.image_vocab_size, (16,), generator=generator)
            row[3:19] = codes + config.first_image_token_id
        rows.append(row.tolist())
    return rows


def windows_of(rows):
    """All documents in one window, told apart by their positions."""
    ids = torch.tensor([sum(rows, [])])
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
    }


def librarys_chameleon(model):
    """Chameleon of the library with the same weights; its own image tokenizer is not asked."""
    tokenizer = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 4,
                 "embed_dim": 4, "latent_channels": 4, "num_embeddings": 2}  # fmt: skip
    config = ChameleonConfig(
        **{name: getattr(model.config, name) for name in SHARED.split()},
        num_key_value_heads=model.config.num_attention_heads,
        rms_norm_eps=model.config.layer_norm_eps,
        swin_norm=True,
        vocabulary_map={"<image>": model.config.image_token_id, "IMGIMGA": model.config.first_image_token_id},
        vq_config=tokenizer,
    )
    theirs = ChameleonForConditionalGeneration(config).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert all("vqmodel" in name for name in missing)
    assert all("image_tokenizer" in name for name in unexpected)
    return theirs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_the_librarys_chameleon(make_chameleon, attention):
    model = make_chameleon(attn_implementation=attention)
    theirs = librarys_chameleon(model)
    for row in rows_of(model.config):
        ids = torch.tensor([row])
        expected = theirs.lm_head(theirs.model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_the_kind_of_attention_may_change_while_the_model_lives(make_chameleon):
    model = make_chameleon()
    ids = torch.tensor([rows_of(model.config)[1]])
    before = model(input_ids=ids).logits
    assert model(input_ids=ids, output_hidden_states=True).hidden_states[0].shape == (1, 29, 20)
    model.set_attn_implementation("eager")
    after = model(input_ids=ids, output_attentions=True)
    assert len(after.attentions) == 3 and after.attentions[0].shape == (1, 2, 29, 29)  # of eager attention alone
    torch.testing.assert_close(after.logits, before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["running", "grid"])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, (93, 121, 102, 88)], ids=["short", "long"]
)  # CM3Leon reads long ones apart
def test_packed_documents_are_read_as_each_by_itself(make_chameleon, attention, positions, lengths):
    model = make_chameleon(attn_implementation=attention, image_positions=positions)
    rows = rows_of(model.config, lengths)
    window = windows_of(rows)
    window.pop("labels")
    packed = model(**window, use_cache=False).logits[0].split(lengths)
    for row, found in zip(rows, packed, strict=True):
        torch.testing.assert_close(found, model(input_ids=torch.tensor([row])).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["running", "grid"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reading_token_by_token_behind_a_cache_equals_reading_at_once(make_chameleon, kind, positions):
    model = make_chameleon(image_positions=positions)
    row = rows_of(model.config)[1]
    whole = model(input_ids=torch.tensor([row])).logits[0]
    ids = torch.tensor([[0, 0, *row]])  # padded on the left
    mask = torch.tensor([[0, 0] + [1] * len(row)])
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    found = [model(input_ids=ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache).logits[0, 2:]]
    for place in range(12, ids.shape[1]):
        places = torch.tensor([[place - 5 if place - 5 < 16 else -1]])
        out = model(
            input_ids=ids[:, place : place + 1],
            attention_mask=mask[:, : place + 1],
            position_ids=torch.tensor([[place - 2]]),
            past_key_values=cache,
            image_places=places,
        )
        found.append(out.logits[0])
    torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-5)


def test_recomputed_layers_have_the_same_gradients(make_chameleon):
    gradients = []
    for recomputes in (False, True):
        model = make_chameleon().train()
        if recomputes:
            model.activation_checkpointing_enable()
        model(**windows_of(rows_of(model.config))).loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(gradients[0]) == 3 * 13 + 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_begin_as_the_librarys():
    torch.manual_seed(0)
    fields = {"vocab_size": 900, "image_vocab_size": 23, "num_sentinel_tokens": 7, "first_image_token_id": 700}
    ids = {"first_sentinel_token_id": 800, "break_token_id": 820, "eoss_token_id": 821, "image_token_id": 822}
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "initializer_range": 0.03}
    model = CM3LeonForConditionalGeneration(CM3LeonConfig(**CHAMELEON, **fields, **ids, **sizes))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float("bias" not in name))), name
        else:
            assert abs(weight.std() / 0.03 - 1) < 0.03 and weight.abs().max() > 0.1, name  # not cut at three of them


def weighted_loss(model, batch, z_loss_weight, image_loss_weight):
    """The loss from its formulas on the logits of every position."""
    targets = shift_labels(batch["labels"], batch["position_ids"])
    kept = targets != -100
    scores, wanted = (
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[kept],
        targets[kept],
    )
    is_code = (wanted >= model.config.first_image_token_id) & (wanted < model.config.image_token_ids.stop)
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
    cross_entropy = -probabilities.gather(1, wanted[:, None])[:, 0].log()
    weights = torch.where(is_code, image_loss_weight, 1.0)
    loss = (weights * (cross_entropy + z_loss_weight * scores.exp().sum(-1).log() ** 2)).sum() / weights.sum()
    return loss, cross_entropy[~is_code].mean(), cross_entropy[is_code].mean()


@pytest.mark.parametrize("num_scores", [2**24, 700], ids=["at once", "in pieces"])
@pytest.mark.parametrize(("z_loss_weight", "image_loss_weight"), [(0.1, 1.0), (0.0, 0.3), (0.1, 0.0)])
def test_the_loss_is_that_of_its_formula_over_accumulated_batches(
    make_chameleon, monkeypatch, num_scores, z_loss_weight, image_loss_weight
):
    monkeypatch.setattr(modeling_cm3leon, "MAX_SCORES", num_scores)
    model = make_chameleon(z_loss_weight=z_loss_weight, image_loss_weight=image_loss_weight).double().train()
    rows = rows_of(model.config, (13, 29, 6, 24))
    whole, halves = windows_of(rows), [windows_of(rows[:1]), windows_of(rows[1:])]
    whole["labels"][0, :2] = halves[0]["labels"][0, :2] = -100
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    with torch.no_grad():
        _, text_loss, image_loss = weighted_loss(model.eval(), whole, z_loss_weight, image_loss_weight)
    expected = weighted_loss(model, whole, z_loss_weight, image_loss_weight)[0]
    gradients = torch.autograd.grad(expected, weights)
    counts = [model.count_targets(half) for half in halves]
    counts = {name: sum(count[name] for count in counts) for name in counts[0]}
    outputs = [model.train()(**half, **counts) for half in halves]
    found = {name: sum(out[name] for out in outputs) for name in ("loss", "text_loss", "image_loss")}
    for name, wanted in {"loss": expected, "text_loss": text_loss, "image_loss": image_loss}.items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=0)  # scored in float32
    for gradient, wanted in zip(torch.autograd.grad(found["loss"], weights), gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_without_z_loss_and_weights_the_loss_is_the_librarys_cross_entropy(make_chameleon):
    model = make_chameleon()
    batch = windows_of(rows_of(model.config))
    out = model(**batch)
    targets = shift_labels(batch["labels"], batch["position_ids"]).flatten()
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets, ignore_index=-100)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)


def test_weights_of_codes_need_both_counts_and_may_be_small(make_chameleon):
    model = make_chameleon(image_loss_weight=1e-3).train()
    batch = windows_of(rows_of(model.config, (13, 29)))
    counts = model.count_targets(batch)
    with pytest.raises(ValueError, match="`image_loss_weight` .* is 0.001, .*Give both"):
        model(**batch, num_items_in_batch=counts["num_items_in_batch"])
    labels, codes = batch["labels"], range(model.config.first_image_token_id, model.config.image_token_ids.stop)
    labels[~torch.isin(labels, torch.tensor(list(codes)))] = -100
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss.detach(), outputs.image_loss, atol=0.2, rtol=0)  # but for the z-loss


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"decoder_block": "llama"}, "`decoder_block`='llama' must be one of"),
        ({"objective": "fim"}, "`objective`='fim' must be one of .*'cm3', 'causal'"),
        ({"z_loss_weight": -1e-5}, "`z_loss_weight`=-1e-05 must be at least 0"),
        ({"image_loss_weight": -1.0}, "`image_loss_weight`=-1.0 must be at least 0"),
        (
            {**CHAMELEON, "image_positions": "rotary"},
            "`image_positions`='rotary' .*'chameleon' has 'running' and 'grid'",
        ),
        ({**CHAMELEON, "hidden_size": 18}, "heads of 9, which `decoder_block`='chameleon' rotates in pairs"),
    ],
)
def test_what_does_not_fit_is_refused(make_config, fields, told):
    with pytest.raises(StrictDataclassClassValidationError, match=told):
        make_config(**fields)
