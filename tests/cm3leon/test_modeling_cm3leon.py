import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, CM3LeonModel, modeling_cm3leon
from hf_mm.cm3leon.layout_cm3leon import places_in_image, shift_labels
from hf_mm.cm3leon.places_cm3leon import PlaceRotation
from hf_mm.training.optimization import hold_rows


EOS, PAD = 2, 0
TEXT = [31, 32, 33]


def image(config, seed):
    """Ids of the codes of one picture."""
    rng = torch.Generator().manual_seed(seed)
    return (config.first_image_token_id + torch.randint(23, (config.tokens_per_image,), generator=rng)).tolist()


def documents(config):
    """Pair, masked pair with its tail, text, two pairs."""
    brk, s0, eoss = config.break_token_id, config.first_sentinel_token_id, config.eoss_token_id
    return [
        [EOS, *TEXT, brk, *image(config, 0), EOS],
        [EOS, s0, brk, *image(config, 1), EOS, s0, 41, 42, eoss],
        [EOS, 51, 52, 53, 54, 55, EOS],
        [EOS, 61, brk, *image(config, 2), brk, 62, 63, brk, *image(config, 3), EOS],
    ]


def batch_of(rows):
    """Training batch of documents of one row each, padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=PAD),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(
            [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows], batch_first=True, padding_value=-100
        ),
    }


def pack(rows, padding=0):
    """The same documents in one window, told apart by their positions; padding is its own."""
    return {
        "input_ids": F.pad(torch.tensor([sum(rows, [])]), (0, padding), value=PAD),
        "labels": F.pad(torch.tensor([sum(([-100, *row[1:]] for row in rows), [])]), (0, padding), value=-100),
        "position_ids": torch.cat([torch.arange(length) for length in [*map(len, rows), padding]])[None],
    }


def changed(before, after):
    return set((before - after).abs().amax(-1).nonzero().flatten().tolist())


def naive_forward(model, ids):
    """Logits of one document from the public formulas, in plain matrix products."""
    weights, config = dict(model.named_parameters()), model.config

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()

    width = config.hidden_size // config.num_attention_heads
    x = weights["model.embed_tokens.weight"][ids] + weights["model.embed_positions.weight"][: len(ids)]
    for layer in range(config.num_hidden_layers):
        part = {name: weights[f"model.layers.{layer}.{name}.weight"].T for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"
        )}  # fmt: skip
        q, k, v = (norm(x) @ part[f"self_attn.{name}_proj"] for name in "qkv")
        heads = []
        for start in range(0, config.hidden_size, width):
            cut = slice(start, start + width)
            scores = (q[:, cut] @ k[:, cut].T / math.sqrt(width)).masked_fill(
                ~torch.ones(len(ids), len(ids)).tril().bool(), -math.inf
            )
            heads.append(scores.softmax(-1) @ v[:, cut])
        x = x + torch.cat(heads, -1) @ part["self_attn.o_proj"]
        x = x + (norm(x) @ part["mlp.up_proj"]).clamp(min=0) @ part["mlp.down_proj"]
    return norm(x) @ weights["model.embed_tokens.weight"].T


def test_the_decoder_equals_its_formulas(make_model):
    model = make_model().double()
    for document in documents(model.config):
        logits = model(input_ids=torch.tensor([document])).logits[0]
        torch.testing.assert_close(logits, naive_forward(model, document), rtol=0, atol=1e-9)


def test_there_is_no_bias_no_norm_weight_and_no_dropout(make_model):
    model = make_model(vq_config=None).train()
    assert all(name.endswith("weight") and "norm" not in name for name, _ in model.named_parameters())
    assert all(weight.ndim == 2 for weight in model.parameters())
    batch = batch_of(documents(model.config))
    assert torch.equal(model(**batch).loss, model(**batch).loss)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    fields = {"vocab_size": 9000, "image_vocab_size": 23, "num_sentinel_tokens": 7, "first_image_token_id": 8000}
    ids = {"first_sentinel_token_id": 8100, "break_token_id": 8200, "eoss_token_id": 8201, "image_token_id": 8202}
    config = CM3LeonConfig(hidden_size=160, num_hidden_layers=2, num_attention_heads=5, **fields, **ids)
    model = CM3LeonForConditionalGeneration(config)
    kinds = set()
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            kinds.add("zero")
            assert not weight.any(), name
            continue
        std = 0.0002 if "embed_positions" in name else 0.006
        kinds.add(std)
        # A normal cut at three standard deviations has 0.98658 of the spread.
        assert abs(weight.std() / (0.98658 * std) - 1) < 0.02, name
        assert abs(weight.mean()) < 0.03 * std
        assert 2.9 * std < weight.abs().max() <= 3 * std * (1 + 1e-6), name
    assert kinds == {"zero", 0.0002, 0.006}


def test_every_layer_begins_as_the_identity():
    config = CM3LeonConfig(hidden_size=12, num_hidden_layers=3, num_attention_heads=3)
    model = CM3LeonForConditionalGeneration(config).eval()
    states = model(input_ids=torch.tensor([[2, 5, 6]]), output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(torch.equal(states[0], state) for state in states[1:3])
    model.train()(input_ids=torch.tensor([[2, 5, 6]]), labels=torch.tensor([[2, 5, 6]])).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()  # and leaves it at the first step


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_is_seen_by_itself_and_what_follows_only(make_model, attention):
    model = make_model(attn_implementation=attention).double()
    ids = torch.tensor([documents(model.config)[3]])
    before = model.model(input_ids=ids).last_hidden_state[0]
    for place in (1, 2, 7, 20, 25, ids.shape[1] - 1):
        other = ids.clone()
        other[0, place] = 77
        assert changed(before, model.model(input_ids=other).last_hidden_state[0]) == set(range(place, ids.shape[1]))


def test_eager_and_sdpa_agree(make_model):
    eager, sdpa = (make_model(attn_implementation=name) for name in ("eager", "sdpa"))
    batch = batch_of(documents(eager.config))
    kept = batch["attention_mask"].bool()
    first, second = (model(**batch).logits[kept] for model in (eager, sdpa))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    packed = pack(documents(eager.config), 3)
    torch.testing.assert_close(eager(**packed).loss, sdpa(**packed).loss, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_flex_attention_agrees(make_model):
    sdpa, flex = (make_model(attn_implementation=name) for name in ("sdpa", "flex_attention"))
    batch = batch_of(documents(sdpa.config))
    kept = batch["attention_mask"].bool()
    packed = pack(documents(sdpa.config), 3)
    with torch.no_grad():
        first, second = (model(**batch).logits[kept] for model in (sdpa, flex))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-3)
        torch.testing.assert_close(sdpa(**packed).loss, flex(**packed).loss, rtol=0, atol=1e-4)


def test_attention_weights_are_shown_where_asked(make_model):
    model = make_model(attn_implementation="eager")
    out = model(input_ids=torch.tensor([[EOS, *TEXT]]), output_attentions=True)
    assert len(out.attentions) == 3 and out.attentions[0].shape == (1, 2, 4, 4)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(1, 2, 4))


def test_places_are_counted_anew_in_every_image():
    config = SimpleNamespace(first_image_token_id=100, image_vocab_size=10)
    ids = torch.tensor([[100, 109, 5, 104, 103, 102, 110], [7, 99, 101, 101, 101, 8, 100]])
    assert places_in_image(ids, config).tolist() == [[0, 1, -1, 0, 1, 2, -1], [-1, -1, 0, 1, 2, -1, 0]]


def test_a_grid_tells_codes_their_place_and_adds_one_table(make_model):
    model = make_model(image_positions="grid").double()
    short = documents(model.config)[0]
    running = make_model()
    assert set(model.state_dict()) - set(running.state_dict()) == {"model.embed_places.weight"}
    ids = torch.tensor([short])
    moved = places_in_image(ids, model.config).clamp(max=3)
    expected, other = (model(input_ids=ids, image_places=value).logits for value in (None, moved))
    first = (places_in_image(ids, model.config) > 3)[0].nonzero()[0, 0]
    torch.testing.assert_close(other[:, :first], expected[:, :first])
    assert (other[:, first] - expected[:, first]).abs().max() > 1e-3


def test_a_rotation_compares_the_place_to_come_with_the_same_place_elsewhere():
    places = torch.tensor([[-1, 0, 1, 2, 3, -1, 0, 1, 2, 3, -1]])
    rotation = PlaceRotation.of(places, 16, 4, torch.float64)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = vector.expand(1, 2, places.shape[1], 16)
    query, key = rotation.rotate(same, same)
    scores = query[0, 0] @ key[0, 0].T
    for row, place in enumerate(places[0].tolist()):  # one vector everywhere: least rotated is most alike
        aimed = places[0] == (place + 1 if place + 1 < 4 else 3)
        assert scores[row][aimed].min() > scores[row][(places[0] >= 0) & ~aimed].max()
    torch.testing.assert_close(query[..., 8:], same[..., 8:])
    torch.testing.assert_close(query.norm(dim=-1), same.norm(dim=-1))


def test_places_that_cannot_be_known_are_refused(make_model):
    model = make_model(image_positions="grid")
    row = documents(model.config)[0]
    ids, cache = torch.tensor([row]), DynamicCache(config=model.config)
    model(input_ids=ids[:, :2], past_key_values=cache)
    model(input_ids=ids[:, 2:5], past_key_values=cache)
    with pytest.raises(ValueError, match="image_places"):
        model(input_ids=ids[:, 5:6], past_key_values=cache)
    with pytest.raises(ValueError, match="image_places"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    codes = torch.full((1, model.config.tokens_per_image + 1), model.config.first_image_token_id)
    with pytest.raises(ValueError, match="run of more codes than the 16"):
        model(input_ids=codes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_model, side):
    model = make_model()
    batch = batch_of(documents(model.config)[:1])
    expected = model(**batch)
    widths = (5, 0) if side == "left" else (0, 5)
    padded = {name: F.pad(batch[name], widths, value=fill) for name, fill in zip(batch, (PAD, 0, -100), strict=True)}
    out = model(**padded)
    kept = padded["attention_mask"][0].bool()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits[:, kept], expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("image_positions", ["running", "grid", "rotary"])
def test_packing_changes_nothing(make_model, image_positions):
    model = make_model(image_positions=image_positions).train()
    rows = documents(model.config)
    separate, packed = batch_of(rows), pack(rows, padding=7)
    expected, out = model(**separate), model(**packed)
    for name in ("loss", "text_loss", "image_loss"):
        torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-5)
    assert {name: int(count) for name, count in model.count_targets(packed).items()} == {
        name: int(count) for name, count in model.count_targets(separate).items()
    }


def test_packed_documents_do_not_see_each_other(make_model):
    model = make_model().double()
    rows = documents(model.config)
    packed = {name: value for name, value in pack(rows).items() if name != "labels"}
    before = model.model(**packed, use_cache=False).last_hidden_state[0]
    start = len(rows[0]) + 2
    packed["input_ids"][0, start] = 77
    after = model.model(**packed, use_cache=False).last_hidden_state[0]
    assert changed(before, after) == set(range(start, len(rows[0]) + len(rows[1])))


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": True},
        {},  # decoding keeps a cache unless told otherwise
        {"attention_mask": torch.ones(1, 7, dtype=torch.long), "use_cache": False},
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1]]), "use_cache": False},
    ],
    ids=["cache", "default", "mask", "mask with a gap"],
)
def test_packed_documents_that_would_see_each_other_are_refused(make_model, arguments):
    model = make_model()
    ids, positions = torch.tensor([[EOS, 11, 12, EOS, EOS, 13, EOS]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for part in (model, model.model):
        with pytest.raises(ValueError, match="position_ids"):
            part(input_ids=ids, position_ids=positions, **arguments)


def test_positions_that_only_run_on_are_not_taken_for_packing(make_model):
    model = make_model()
    ids, mask = torch.tensor([[PAD, PAD, EOS, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1]])
    out = model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2]]))
    torch.testing.assert_close(out.logits[:, 2:], model(input_ids=ids[:, 2:]).logits, rtol=0, atol=1e-4)


def test_a_window_may_be_longer_than_the_longest_document(make_model):
    model = make_model(max_position_embeddings=24).train()
    rows = documents(model.config)[:3]
    packed = pack(rows)
    assert packed["input_ids"].shape[1] > 24
    torch.testing.assert_close(model(**packed).loss, model(**batch_of(rows)).loss, rtol=1e-5, atol=1e-5)


def test_a_document_longer_than_the_positions_is_refused(make_model):
    model = make_model(max_position_embeddings=24)
    with pytest.raises(ValueError, match="max_position_embeddings.*24"):
        model(input_ids=torch.full((1, 25), 11))
    out = model(input_ids=torch.full((1, 20), 11))
    with pytest.raises(ValueError, match="max_position_embeddings.*24"):
        model(input_ids=torch.full((1, 5), 11), past_key_values=out.past_key_values)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_reading_equals_one_pass(make_model, kind):
    model = make_model().double()
    ids = torch.tensor([documents(model.config)[0]])
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    whole, pieces, start = model(input_ids=ids).logits, [], 0
    for step in (9, 1, 1, 1, 9, 1):
        pieces.append(model(input_ids=ids[:, start : start + step], past_key_values=cache).logits)
        start += step
    assert start == ids.shape[1]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_every_kind_of_cache_writes_the_same(make_model, options):
    model = make_model()
    ids = torch.tensor([[PAD, PAD, EOS, 11, 12], [EOS, 13, 14, 15, 16]])
    arguments = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    if "cache_implementation" in options:
        options = {**options, "disable_compile": True}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, **options))
    alone = model.generate(ids[:1, 2:], max_new_tokens=7, min_new_tokens=7, do_sample=False)
    assert torch.equal(model.generate(ids, **arguments)[:1, 2:], alone)


def test_the_loss_equals_its_definition(make_model):
    model = make_model()
    rows, config = documents(model.config), model.config
    terms = {"text": [], "image": []}
    for row in rows:
        log_probs = naive_forward(model, row).log_softmax(-1)
        for place, token in enumerate(row[1:]):
            terms["image" if token in config.image_token_ids else "text"].append(-log_probs[place, token])
    out = model(**batch_of(rows))
    everything = torch.stack(terms["text"] + terms["image"])
    torch.testing.assert_close(out.loss, everything.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.text_loss, torch.stack(terms["text"]).mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.image_loss, torch.stack(terms["image"]).mean(), rtol=1e-4, atol=1e-4)
    counts = model.count_targets(batch_of(rows))
    assert {name: int(count) for name, count in counts.items()} == {
        "num_items_in_batch": len(everything),
        "num_image_items_in_batch": 4 * 16,
    }
    for name, value in model(**batch_of(rows), **counts).items():
        if name.endswith("loss"):
            torch.testing.assert_close(value, out[name])


def test_no_target_crosses_from_one_packed_document_into_the_next():
    ids, positions = torch.tensor([[EOS, 11, EOS, EOS, 13, EOS]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert shift_labels(ids, positions)[0].tolist() == [11, EOS, -100, 13, EOS, -100]
    assert shift_labels(ids, None)[0].tolist() == [11, EOS, EOS, 13, EOS, -100]


def test_training_computes_the_same_loss_as_evaluation_and_leaves_the_logits_out(make_model):
    model = make_model()
    batch = batch_of(documents(model.config))
    evaluated, trained = model(**batch), model.train()(**batch)
    assert trained.logits is None and trained.past_key_values is None
    assert evaluated.logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)
    torch.testing.assert_close(trained.loss, evaluated.loss)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_do_not_depend_on_how_many_scores_are_held(make_model, monkeypatch, tied, autocast):
    model = make_model(tie_word_embeddings=tied).train()
    batch, sizes, found = batch_of(documents(model.config)), [], []
    batch["labels"][1, 3:9] = -100
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    num_targets = int(model.count_targets(batch)["num_items_in_batch"])
    for rows in (1000, 7, 1, 0.3):
        monkeypatch.setattr(modeling_cm3leon, "MAX_SCORES", int(rows * model.config.vocab_size))
        model.zero_grad()
        sizes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**batch)
        out.loss.backward()
        scored = sum(sizes)  # nothing again in the backward pass
        assert scored == num_targets * model.config.vocab_size
        assert max(sizes) == model.config.vocab_size * (num_targets if rows == 1000 else max(1, int(rows)))
        found.append(
            (out, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        )
    expected, grads = found[0]
    for out, others in found[1:]:
        for name in ("loss", "text_loss", "image_loss"):
            torch.testing.assert_close(out[name], expected[name])
        assert others.keys() == grads.keys()
        for name, grad in grads.items():
            difference = (others[name] - grad).abs().max() / grad.abs().max()
            assert difference < (5e-2 if autocast else 1e-5), name  # sums of bfloat16 gradients are rounded


@pytest.mark.parametrize("num_rows", [1000, 7])
def test_of_held_rows_no_gradient_is_computed_and_the_others_have_theirs(make_model, monkeypatch, num_rows):
    model = make_model().train()
    batch = batch_of(documents(model.config))
    monkeypatch.setattr(modeling_cm3leon, "MAX_SCORES", num_rows * model.config.vocab_size)
    weight, codes, found = model.get_input_embeddings().weight, model.config.image_token_ids, []
    for holds in (False, True):
        if holds:
            hold_rows(weight, slice(codes.start, codes.stop))
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            out = model(**batch)
            out.loss.backward()
        grads = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        found.append((out.loss, grads, counter))
    (expected, grads, all_flops), (loss, others, flops) = found
    torch.testing.assert_close(loss, expected)
    grads["model.embed_tokens.weight"][codes.start : codes.stop] = 0
    torch.testing.assert_close(others, grads)
    num_targets = int(model.count_targets(batch)["num_items_in_batch"])
    saved = all_flops.get_total_flops() - flops.get_total_flops()
    assert saved == 2 * num_targets * len(codes) * model.config.hidden_size


def test_an_output_layer_with_an_adapter_is_gone_through_though_rows_are_held(make_model):
    model = make_model(tie_word_embeddings=False).train()
    hold_rows(model.lm_head.weight, slice(2, 5))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    model(**batch_of(documents(model.config))).loss.backward()
    assert any(weight.grad.any() for name, weight in model.named_parameters() if "lora_B" in name)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(make_model):
    model = make_model().train()
    batch = batch_of(documents(model.config))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = model(**batch)
    assert (out.loss, out.text_loss, out.image_loss) == (0, 0, 0)
    out.loss.backward()
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_accumulated_micro_batches_equal_one_big_batch(make_model):
    model = make_model().train()
    rows = documents(model.config)
    whole = batch_of(rows)
    counts = model.count_targets(whole)
    expected = model(**whole)
    expected.loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    outs = [model(**batch_of(part), **counts) for part in (rows[:1], rows[1:3], rows[3:])]
    for name in ("loss", "text_loss", "image_loss"):
        torch.testing.assert_close(sum(out[name] for out in outs), expected[name], rtol=1e-5, atol=1e-5)
    sum(out.loss for out in outs).backward()
    for name, weight in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(weight.grad, grads[name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_model):
    model = make_model().train()
    batch = batch_of(documents(model.config))
    grads, losses = [], []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 + 6 * 3
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


def test_pictures_stand_for_their_codes(make_model):
    model = make_model()
    config = model.config
    brk, pixels = config.break_token_id, torch.rand(2, 3, 8, 8) * 2 - 1
    codes = model.encode_images(pixels)
    assert codes.shape == (2, 16) and len(codes.unique()) > 5
    assert codes.min() >= config.image_token_ids[0] and codes.max() <= config.image_token_ids[-1]
    holes = [config.image_token_id] * 16
    ids = torch.tensor([[EOS, 11, brk, *holes, EOS], [EOS, *holes, brk, 12, EOS]])
    filled = torch.tensor([[EOS, 11, brk, *codes[0], EOS], [EOS, *codes[1], brk, 12, EOS]])
    given = model(input_ids=ids, pixel_values=pixels, labels=ids)
    meant = model(input_ids=filled, labels=filled)
    assert torch.equal(given.logits, meant.logits) and torch.equal(given.loss, meant.loss)
    assert torch.equal(given.image_loss, meant.image_loss)
    assert model.count_targets({"labels": ids}) == model.count_targets({"labels": filled})
    states = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
    assert torch.equal(states, model.model(input_ids=filled).last_hidden_state)


def test_codes_are_the_nearest_entries_of_the_codebook_row_by_row(make_model):
    model = make_model()
    tokenizer, pixels = model.image_tokenizer, torch.rand(2, 3, 8, 8) * 2 - 1
    vectors, codebook = tokenizer.encode(pixels).latents, tokenizer.quantize.embedding.weight
    codes = model.encode_images(pixels) - model.config.first_image_token_id
    for place in ((0, 0, 0), (1, 1, 2), (1, 3, 3)):
        number, row, column = place
        nearest = (codebook - vectors[number, :, row, column]).square().sum(-1).argmin()
        assert codes[number, 4 * row + column] == nearest
    assert torch.equal(codes.flatten(), tokenizer.quantize(vectors)[2][2])
    torch.testing.assert_close(
        model.decode_image_tokens(model.encode_images(pixels)), tokenizer.decode(vectors).sample
    )


@pytest.mark.parametrize("fields", [{}, {"vq_embed_dim": 5}])
@pytest.mark.parametrize("lookup", [False, True])
def test_codes_become_pictures_whatever_the_tokenizers_decode_takes(make_model, tiny_vq, fields, lookup):
    model = make_model(vq_config={**tiny_vq, **fields, "lookup_from_codebook": lookup})
    tokenizer, pixels = model.image_tokenizer, torch.rand(2, 3, 8, 8) * 2 - 1
    # Quantizing is what either kind of tokenizer does by itself with what its encoder gives.
    expected = tokenizer.decode(tokenizer.encode(pixels).latents).sample
    torch.testing.assert_close(model.decode_image_tokens(model.encode_images(pixels)), expected)


@pytest.mark.parametrize(
    ("count", "holes", "match"),
    [
        (1, 32, "placeholders.*16 codes"),
        (2, 16, "placeholders.*32 codes"),
        (1, 15, "placeholders"),
        (0, 16, "0 codes"),
    ],
)
def test_pictures_that_do_not_fit_their_placeholders_are_refused(make_model, count, holes, match):
    model = make_model()
    pixels = torch.zeros(count, 3, 8, 8) if count else None
    for part in (model, model.model):
        with pytest.raises(ValueError, match=match):
            part(input_ids=torch.tensor([[EOS, *[model.config.image_token_id] * holes]]), pixel_values=pixels)


def test_pictures_of_another_size_are_refused(make_model):
    model = make_model()
    for shape in ((1, 3, 16, 8), (1, 3, 4, 4), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"pixel_values.*8 x 8 pixels, 16 codes.*image_size"):
            model.encode_images(torch.zeros(shape))


def test_codes_that_are_no_picture_are_refused(make_model):
    model = make_model()
    first = model.config.first_image_token_id
    with pytest.raises(ValueError, match="image_ids.*(1, 15).*16 codes"):
        model.decode_image_tokens(torch.full((1, 15), first))
    for stranger in (first - 1, first + 23):
        ids = torch.full((1, 16), first)
        ids[0, 7] = stranger
        with pytest.raises(ValueError, match="image_ids.*no image codes"):
            model.decode_image_tokens(ids)


def test_a_model_without_an_image_tokenizer_reads_codes_and_refuses_pictures(make_model):
    model = make_model(vq_config=None, image_size=32)
    assert model.image_tokenizer is None
    assert model(**batch_of(documents(model.config))).loss.isfinite()
    for call in (model.encode_images, model.decode_image_tokens):
        with pytest.raises(ValueError, match="vq_config"):
            call(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="vq_config"):
        model(input_ids=torch.tensor([[model.config.image_token_id]]), pixel_values=torch.zeros(1, 3, 8, 8))


def test_embeddings_may_be_given_instead_of_ids(make_model):
    model = make_model()
    ids = torch.tensor([[EOS, *TEXT]])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, labels=ids).loss, model(input_ids=ids, labels=ids).loss)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
            model(**arguments)
    with pytest.raises(ValueError, match="pixel_values.*input_ids"):
        model(inputs_embeds=embeds, pixel_values=torch.zeros(1, 3, 8, 8))


def test_the_image_tokenizer_is_frozen_in_training_and_after_loading(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for model in (make_model(), CM3LeonForConditionalGeneration.from_pretrained(tmp_path)):
        model.train()
        assert not any(module.training for module in model.image_tokenizer.modules())
        assert not any(weight.requires_grad for weight in model.image_tokenizer.parameters())
        ids = torch.tensor([[EOS, 11, model.config.break_token_id, *[model.config.image_token_id] * 16, EOS]])
        model(input_ids=ids, labels=ids, pixel_values=torch.rand(1, 3, 8, 8)).loss.backward()
        assert all(weight.grad is None for weight in model.image_tokenizer.parameters())
        assert model.model.embed_tokens.weight.grad.any()


def test_a_saved_model_loads_with_the_same_outputs(make_model, tmp_path):
    model = make_model()
    batch = batch_of(documents(model.config))
    model.save_pretrained(tmp_path)
    again = CM3LeonForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    for name, weight in model.image_tokenizer.state_dict().items():
        assert torch.equal(again.image_tokenizer.state_dict()[name], weight), name
    backbone = CM3LeonModel.from_pretrained(tmp_path).eval()
    ids = batch["input_ids"][:1]
    assert torch.equal(backbone(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
    ends = [EOS, model.config.eoss_token_id]
    assert model.generation_config.eos_token_id == again.generation_config.eos_token_id == ends


def test_layers_that_a_checkpoint_lacks_change_nothing_until_they_are_trained(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    num_layers = model.config.num_hidden_layers
    deeper = CM3LeonForConditionalGeneration.from_pretrained(tmp_path, num_hidden_layers=num_layers + 2).eval()
    batch = batch_of(documents(model.config))
    assert len(deeper.model.layers) == num_layers + 2
    assert torch.equal(deeper(**batch).loss, model(**batch).loss)
    deeper.train()(**batch).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.any() for layer in deeper.model.layers)


def test_an_output_layer_of_its_own_is_no_copy(make_model, tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    again = CM3LeonForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[EOS, *TEXT]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_a_checkpoint_lacks_begins_as_published(make_model, tmp_path):
    model = make_model(vq_config=None, image_size=32, initializer_range=0.006)
    model.save_pretrained(tmp_path, state_dict={
        name: weight for name, weight in model.state_dict().items() if "layers.1" not in name and "positions" not in name
    })  # fmt: skip
    again = CM3LeonForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.model.layers[1].mlp.down_proj.weight.any() and again.model.layers[0].mlp.down_proj.weight.any()
    assert 0 < again.model.layers[1].mlp.up_proj.weight.abs().max() <= 0.018 + 1e-6
    assert again.model.embed_positions.weight.any()


@torch.no_grad()
def test_an_image_tokenizer_that_asks_for_float32_computes_in_it(make_model, tiny_vq):
    model = make_model(vq_config={**tiny_vq, "force_upcast": True})
    pixels = torch.rand(2, 3, model.config.image_size, model.config.image_size) * 2 - 1
    model.image_tokenizer.load_state_dict(model.image_tokenizer.bfloat16().float().state_dict())
    ids = model.encode_images(pixels)
    pictures = model.decode_image_tokens(ids)
    assert torch.equal(model.bfloat16().encode_images(pixels), ids)
    torch.testing.assert_close(model.bfloat16().decode_image_tokens(ids), pictures)
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_images(pixels), ids)
        assert torch.equal(model.decode_image_tokens(ids), pictures)
    seen = []
    model.image_tokenizer.decoder.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    before = torch.backends.cudnn.conv.fp32_precision
    model.decode_image_tokens(ids)
    assert seen == ["ieee"] and torch.backends.cudnn.conv.fp32_precision == before


def test_a_pretrained_image_tokenizer_is_taken_over_with_its_weights(make_model, tiny_vq, tmp_path):
    tokenizer = VQModel(**tiny_vq)
    tokenizer.save_pretrained(tmp_path)
    model, pixels = make_model(), torch.rand(1, 3, 8, 8)
    model.load_image_tokenizer(str(tmp_path))
    expected = tokenizer.quantize(tokenizer.encode(pixels).latents)[2][2]
    assert torch.equal(model.encode_images(pixels)[0] - model.config.first_image_token_id, expected)


def test_an_image_tokenizer_of_another_codebook_is_refused(make_model, tiny_vq, tmp_path):
    VQModel(**{**tiny_vq, "num_vq_embeddings": 29}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="29 codes.*image_vocab_size.*23"):
        make_model().load_image_tokenizer(str(tmp_path))


def test_bf16_autocast_and_bf16_weights_train_on_pictures(make_model):
    model = make_model(initializer_range=0.1).train()
    ids = torch.tensor([[EOS, 11, model.config.break_token_id, *[model.config.image_token_id] * 16, EOS]])
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.rand(1, 3, 8, 8)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    expected = model(**batch).loss
    assert loss.dtype == torch.float32 and abs(loss - expected) < 0.1 * expected
    model = model.to(torch.bfloat16)
    model(**batch).loss.backward()


def test_two_models_of_one_configuration_do_not_change_each_other(make_config):
    config = make_config()
    first = CM3LeonForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="eager")
    CM3LeonForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    assert first.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_lora_trains(make_model):
    from peft import LoraConfig, get_peft_model

    model = make_model(initializer_range=0.1)
    batch = batch_of(documents(model.config))
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["v_proj", "up_proj", "down_proj"], task_type=None)
    ).train()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(weights) == 3 * 2 * model.config.num_hidden_layers
    optimizer = torch.optim.AdamW(weights, lr=3e-2)
    losses = []
    for _ in range(15):
        losses.append(adapted(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_four_rows_are_learnt_by_heart(make_config):
    model = CM3LeonForConditionalGeneration(
        make_config(initializer_range=0.05, position_initializer_range=0.05)
    ).train()
    batch = batch_of(documents(model.config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        out = model(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.image_loss < 0.1 and out.text_loss < 0.6  # the four beginnings are equally likely
    batch = batch_of(documents(model.config)[:1])
    greedy = model.eval()(**batch).logits[0, 1:-1].argmax(-1)
    assert torch.equal(greedy, batch["input_ids"][0, 2:])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_the_training_forward_compiles_without_graph_breaks(make_model, packed, holds):
    model = make_model().train()
    if holds:
        hold_rows(model.get_input_embeddings().weight, slice(300, 317))
        model.lm_head.forward = None  # which would compute the gradient of all rows
    rows = documents(model.config)
    batch = pack(rows) if packed else batch_of(rows)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).loss, model(**batch, use_cache=False).loss)
