import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_mm.transfusion import TransfusionForConditionalGeneration, TransfusionModel
from hf_mm.transfusion.layout_transfusion import image_block_ids


BOS, EOS = 1, 2
A, B = (4, 6), (2, 4)  # latent sizes: 6 and 2 patches of 2 x 2
TEXT_1, TEXT_2, TEXT_3 = [BOS, 11, 12], [13, 14, 15, 16], [17, 18]


def pad_images(images):
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return torch.stack(padded), torch.tensor([list(image.shape[1:]) for image in images])


def hidden_states(model, ids, images, times, positions=None):
    latents, sizes = pad_images(images)
    return model.model(
        input_ids=torch.tensor([ids]),
        latents=latents,
        image_sizes=sizes,
        timesteps=torch.tensor(times),
        position_ids=None if positions is None else torch.tensor([positions]),
        use_cache=False,
    ).last_hidden_state[0]


def changed(before, after):
    return set((before - after).abs().amax(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("patch_layer", ["linear", "unet"])
def test_a_patch_is_seen_by_its_whole_image_and_by_what_follows_but_by_nothing_before(
    make_model, lay_out, attention, patch_layer
):
    model = make_model(attn_implementation=attention, patch_layer=patch_layer).double()
    ids = lay_out(model.config, *TEXT_1, A, *TEXT_2, B, *TEXT_3)
    start_a, start_b = 4, 4 + 6 + 1 + 4 + 1
    images = [torch.randn(3, *A).double(), torch.randn(3, *B).double()]
    before = hidden_states(model, ids, images, [100, 300])

    first, second = copy.deepcopy(images), copy.deepcopy(images)
    first[0][:, -1, -1] += 1  # in the last patch of A
    second[1][:, -1, -1] += 1
    assert changed(before, hidden_states(model, ids, first, [100, 300])) == set(range(start_a, len(ids)))
    assert changed(before, hidden_states(model, ids, second, [100, 300])) == set(range(start_b, len(ids)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_text_is_seen_by_nothing_before_it(make_model, lay_out, attention):
    model = make_model(attn_implementation=attention).double()
    ids = lay_out(model.config, *TEXT_1, A, *TEXT_2, B, *TEXT_3)
    images = [torch.randn(3, *A).double(), torch.randn(3, *B).double()]
    before = hidden_states(model, ids, images, [100, 300])
    for position in [1, 3, 10, 12, 15, len(ids) - 1]:  # text, BOI, EOI, text between, BOI, last
        other = list(ids)
        other[position] = 33
        assert changed(before, hidden_states(model, other, images, [100, 300])) == set(range(position, len(ids)))


def test_images_side_by_side_in_packed_documents_do_not_see_each_other(make_model, lay_out):
    model = make_model().double()
    documents = [[BOS, A, EOS], [BOS, 11, B, EOS], [BOS, B, 12, EOS]]
    rows = [lay_out(model.config, *document) for document in documents]
    ids = sum(rows, [])
    positions = sum((list(range(len(row))) for row in rows), [])
    images = [torch.randn(3, *size).double() for size in (A, B, B)]
    before = hidden_states(model, ids, images, [1, 2, 3], positions)
    images[1][0, 0, 0] += 1
    start = len(rows[0]) + 3
    expected = set(range(start, len(rows[0]) + len(rows[1])))
    assert changed(before, hidden_states(model, ids, images, [1, 2, 3], positions)) == expected


def test_packed_text_documents_do_not_see_each_other_through_the_backbone_alone(make_model):
    model = make_model().double()
    ids, positions = torch.tensor([[1, 11, 12, 1, 13, 14]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    before = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    ids[0, 1] = 33
    after = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    assert changed(before, after) == {1, 2}


def test_block_ids_tell_the_images_of_a_row_apart():
    is_image = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 1]]).bool()
    assert image_block_ids(is_image).tolist() == [[0, 0, -1, 1, -1, 2, 2], [-1, 0, 0, 0, -1, -1, 1]]


def test_causal_image_attention_hides_later_patches(make_model, lay_out):
    model = make_model(image_attention="causal").double()
    ids = lay_out(model.config, BOS, A, 11)
    image = torch.randn(3, *A).double()
    before = hidden_states(model, ids, [image], [100])
    other = image.clone()
    other[:, -1, -1] += 1
    assert changed(before, hidden_states(model, ids, [other], [100])) == set(range(2 + 5, len(ids)))


def test_a_timestep_reaches_the_patches_of_its_own_image_only(make_model, lay_out):
    model = make_model().double()
    ids = lay_out(model.config, *TEXT_1, A, *TEXT_2, B, *TEXT_3)
    images = [torch.randn(3, *A).double(), torch.randn(3, *B).double()]
    before = hidden_states(model, ids, images, [100, 300])
    assert changed(before, hidden_states(model, ids, images, [100, 301])) == set(range(16, len(ids)))


def test_eager_and_sdpa_agree(make_model, lay_out):
    models = [make_model(attn_implementation=name).double() for name in ("eager", "sdpa")]
    ids = lay_out(models[0].config, *TEXT_1, A, *TEXT_2, B, *TEXT_3)
    images = [torch.randn(3, *A).double(), torch.randn(3, *B).double()]
    first, second = (hidden_states(model, ids, images, [100, 300]) for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)  # the eager softmax is in float32


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_flex_attention_agrees(make_model, lay_out):
    models = [make_model(attn_implementation=name) for name in ("sdpa", "flex_attention")]
    ids = lay_out(models[0].config, *TEXT_1, A, *TEXT_2, B, *TEXT_3)
    images = [torch.randn(3, *A), torch.randn(3, *B)]
    with torch.no_grad():
        first, second = (hidden_states(model, ids, images, [100, 300]) for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_flash_attention_is_refused(make_model):
    with pytest.raises((ValueError, ImportError), match="(?i)flash"):
        make_model(attn_implementation="flash_attention_2")


def batch_of(model, lay_out, documents, *, seed=0):
    """Training batch of documents of one row each, padded on the right, images in reading order."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.tensor(lay_out(model.config, *document)) for document in documents]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    special = torch.tensor([0, BOS, model.config.eoi_token_id, model.config.image_token_id])
    sizes = [part for document in documents for part in document if not isinstance(part, int)]
    channels = model.config.latent_channels
    images = [torch.randn(channels, *size, generator=rng) for size in sizes]
    noise = [torch.randn(channels, *size, generator=rng) for size in sizes]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(torch.isin(input_ids, special), -100),
    }
    if sizes:
        latents, image_sizes = pad_images(images)
        times = torch.randint(1000, (len(sizes),), generator=rng)
        batch |= {"latents": latents, "image_sizes": image_sizes, "noise": pad_images(noise)[0], "timesteps": times}
    return batch


def alpha_bar(time, num_timesteps=1000):
    """The cosine schedule, index 0 being the paper's t = 1, with betas capped at 0.999."""
    product = 1.0
    for index in range(time + 1):
        now, before = (
            math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in (index + 1, index)
        )
        product *= 1 - min(1 - now / before, 0.999)
    return product


def naive_losses(model, batch):
    """Both losses by loops over positions and elements, each row run by itself, from the public formulas."""
    config, image = model.config, 0
    text_terms, image_terms = [], []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = ids[:length], batch["labels"][row].tolist()
        count = sum(1 for before, now in zip([0, *ids], ids, strict=False) if now == 5 and before != 5)
        noised, targets, times, clean_marks = [], [], [], []
        for number in range(image, image + count):
            height, width = batch["image_sizes"][number].tolist()
            clean, noise = (batch[name][number, :, :height, :width] for name in ("latents", "noise"))
            time = batch["timesteps"][number].item()
            is_clean = "clean_images" in batch and bool(batch["clean_images"][number])
            if config.prediction_type == "flow_prediction":
                share = time / 1000
                x_t, target = (1 - share) * clean + share * noise, noise - clean
            else:
                a = alpha_bar(int(time))
                x_t = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
                target = (
                    noise if config.prediction_type == "epsilon" else math.sqrt(a) * noise - math.sqrt(1 - a) * clean
                )
            noised.append(clean if is_clean else x_t)
            times.append(0 if is_clean else time)
            targets.append(target)
            clean_marks.append(is_clean)
        latents, sizes = pad_images(noised) if noised else (None, None)
        out = model.model(
            input_ids=torch.tensor([ids]),
            latents=latents,
            image_sizes=sizes,
            timesteps=torch.tensor(times) if noised else None,
            use_cache=False,
        )
        log_probs = model.lm_head(out.last_hidden_state)[0].log_softmax(-1)
        for position in range(length - 1):
            if ids[position] != config.boi_token_id and labels[position + 1] != -100:
                text_terms.append(-log_probs[position, labels[position + 1]])
        start = 0
        for target, is_clean in zip(targets, clean_marks, strict=True):
            start = ids.index(config.image_token_id, start)
            height, width = target.shape[1:]
            stop = start + height * width // config.patch_size**2
            vectors = model.model.patch_out.projection(out.last_hidden_state[0, start:stop])
            errors = []
            for number, vector in enumerate(vectors):
                top = number // (width // config.patch_size) * config.patch_size
                left = number % (width // config.patch_size) * config.patch_size
                for channel in range(target.shape[0]):
                    for y in range(config.patch_size):
                        for x in range(config.patch_size):
                            entry = (channel * config.patch_size + y) * config.patch_size + x
                            errors.append((vector[entry] - target[channel, top + y, left + x]) ** 2)
            if not is_clean:
                image_terms.append(torch.stack(errors).mean())
            start = stop
        image += count
    return torch.stack(text_terms).mean(), torch.stack(image_terms).mean(), len(text_terms), len(image_terms)


DOCUMENTS = [[BOS, 11, 12, 13, A, EOS], [BOS, B, 14, 15, A, 16, EOS], [BOS, 17, 18, EOS], [BOS, B, 19, EOS]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_both_losses_equal_their_definitions(make_model, lay_out, prediction_type):
    model = make_model(prediction_type=prediction_type, diffusion_loss_weight=3.5)
    batch = batch_of(model, lay_out, DOCUMENTS)
    if prediction_type == "flow_prediction":
        batch["timesteps"] = batch["timesteps"] + 0.25
    batch["clean_images"] = torch.tensor([False, True, False, False])
    out = model(**batch)
    text_loss, image_loss, num_items, num_images = naive_losses(model, batch)
    torch.testing.assert_close(out.text_loss, text_loss, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(out.image_loss, image_loss, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, text_loss + 3.5 * image_loss, rtol=2e-4, atol=1e-4)
    counts = model.count_targets(batch)
    assert {name: int(count) for name, count in counts.items()} == {
        "num_items_in_batch": num_items,
        "num_images_in_batch": num_images,
    }
    torch.testing.assert_close(model(**batch, **counts).loss, out.loss)


def test_boi_is_a_target_and_predicts_nothing_while_eoi_predicts_and_is_no_target(make_model, lay_out):
    model = make_model()
    ids = torch.tensor([lay_out(model.config, BOS, 11, B, 12, EOS)])
    labels = ids.clone()  # even where labels ask for it, BOI predicts nothing
    targets = model.text_targets(ids, labels, None)[0].tolist()
    assert targets[1] == model.config.boi_token_id and targets[2] == -100
    assert targets[ids[0].tolist().index(model.config.eoi_token_id)] == 12


def test_training_computes_the_same_loss_as_evaluation_and_leaves_the_logits_out(make_model, lay_out):
    model = make_model()
    batch = batch_of(model, lay_out, DOCUMENTS)
    evaluated = model(**batch)
    trained = model.train()(**batch)
    model.eval()
    assert trained.logits is None and evaluated.logits.shape == (
        *batch["input_ids"].shape,
        model.config.text_config.vocab_size,
    )
    torch.testing.assert_close(trained.loss, evaluated.loss)


@pytest.mark.parametrize("patch_positions", ["running", "grid", "rotary"])
@pytest.mark.parametrize("patch_layer", ["linear", "unet"])
def test_images_of_different_sizes_in_one_sequence_equal_each_size_by_itself(
    make_model, lay_out, patch_layer, patch_positions
):
    model = make_model(patch_layer=patch_layer, patch_positions=patch_positions)
    batch = batch_of(model, lay_out, [[BOS, 11, A, 12, EOS], [BOS, B, EOS], [BOS, A, EOS]])
    out = model(**batch)
    for number, (row, size) in enumerate([(0, A), (1, B), (2, A)]):
        length = int(batch["attention_mask"][row].sum())
        height, width = size
        alone = model(
            input_ids=batch["input_ids"][row : row + 1, :length],
            labels=batch["labels"][row : row + 1, :length],
            latents=batch["latents"][number : number + 1, :, :height, :width],
            noise=batch["noise"][number : number + 1, :, :height, :width],
            timesteps=batch["timesteps"][number : number + 1],
        )
        torch.testing.assert_close(out.noise_pred[number, :, :height, :width], alone.noise_pred[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_model, lay_out, side):
    model = make_model()
    batch = batch_of(model, lay_out, [[BOS, 11, A, 12, EOS]])
    expected = model(**batch)
    widths = (5, 0) if side == "left" else (0, 5)
    padded = dict(batch)
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded[name] = F.pad(batch[name], widths, value=value)
    out = model(**padded)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.noise_pred, expected.noise_pred, rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch_layer", ["linear", "unet"])
def test_packing_changes_nothing(make_model, lay_out, patch_layer):
    model = make_model(patch_layer=patch_layer)
    rows = batch_of(model, lay_out, DOCUMENTS)
    lengths = rows["attention_mask"].sum(-1).tolist()
    packed = {name: rows[name] for name in ("latents", "noise", "timesteps", "image_sizes")}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        pieces = [values[:length] for values, length in zip(rows[name], lengths, strict=True)]
        packed[name] = F.pad(torch.cat(pieces), (0, 7), value=fill)[None]
    packed["position_ids"] = torch.cat([torch.arange(length) for length in [*lengths, 7]])[None]
    expected, out = model.train()(**rows), model(**packed)
    model.eval()
    torch.testing.assert_close(out.text_loss, expected.text_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.image_loss, expected.image_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.noise_pred, expected.noise_pred, rtol=0, atol=2e-4)
    assert {name: int(count) for name, count in model.count_targets(packed).items()} == {
        name: int(count) for name, count in model.count_targets(rows).items()
    }


def packed_text():
    return torch.tensor([[1, 11, 12, 2, 1, 13, 14]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": True},
        {},  # drawing and writing keep a cache unless told otherwise
        {"attention_mask": torch.ones(1, 7, dtype=torch.long), "use_cache": False},
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1]]), "use_cache": False},
    ],
    ids=["cache", "default", "mask", "mask with a gap"],
)
def test_packed_documents_that_would_see_each_other_are_refused(make_model, arguments):
    model = make_model()
    ids, positions = packed_text()
    for part in (model, model.model):
        with pytest.raises(ValueError, match="position_ids"):
            part(input_ids=ids, position_ids=positions, **arguments)


def test_positions_that_only_run_on_are_not_taken_for_packing(make_model):
    model = make_model()
    ids, mask = torch.tensor([[0, 0, 1, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = model(input_ids=ids[:, 2:])
    torch.testing.assert_close(out.logits[:, 2:], alone.logits, rtol=0, atol=1e-4)


def test_no_target_crosses_from_one_packed_document_into_the_next(make_model):
    model = make_model()
    ids, positions = packed_text()
    assert model.text_targets(ids, ids.clone(), positions)[0].tolist() == [11, 12, 2, -100, 13, 14, -100]


def test_accumulated_micro_batches_equal_one_big_batch(make_model, lay_out):
    model = make_model().train()
    whole = batch_of(model, lay_out, DOCUMENTS)
    counts = model.count_targets(whole)
    model(**whole).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    image = 0
    for row, document in enumerate(DOCUMENTS):
        count = sum(not isinstance(part, int) for part in document)
        part = {name: whole[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        if count:
            names = ("latents", "noise", "timesteps", "image_sizes")
            part |= {name: whole[name][image : image + count] for name in names}
        image += count
        model(**part, **counts).loss.backward()
    for name, weight in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_texts_counted_without_their_images_are_refused(make_model, lay_out):
    model = make_model()
    batch = batch_of(model, lay_out, DOCUMENTS)
    with pytest.raises(ValueError, match="`num_items_in_batch` and `num_images_in_batch` belong together"):
        model(**batch, num_items_in_batch=7)
    words = batch_of(model, lay_out, [[BOS, 11, 12, EOS]])
    torch.testing.assert_close(model(**words, num_items_in_batch=6).loss * 2, model(**words).loss)


def test_the_librarys_trainer_accumulates_both_losses(make_model, lay_out, tmp_path):
    model = make_model()
    batch = batch_of(model, lay_out, [[BOS, 11, 12, (4, 4), EOS], [BOS, 13, 14, (4, 4), EOS]])
    rows = [{name: value[row] for name, value in batch.items()} for row in (0, 1)]
    settings = {"output_dir": tmp_path, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "report_to": "none",
                "use_cpu": True, "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True}  # fmt: skip
    weights = []
    for batch_size in (2, 1):
        trained = copy.deepcopy(model)
        arguments = TrainingArguments(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=2 // batch_size, **settings
        )
        Trainer(trained, arguments, data_collator=torch.utils.data.default_collate, train_dataset=rows).train()
        weights.append(trained.state_dict())
    moved = [name for name, weight in model.state_dict().items() if not weight.equal(weights[0][name])]
    assert any("patch_out" in name for name in moved) and any("layers.0" in name for name in moved)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_vectors_in_place_of_ids_have_a_loss(make_model, lay_out):
    model = make_model()
    batch = batch_of(model, lay_out, [[BOS, 11, 12, EOS]])
    vectors = model.get_input_embeddings()(batch["input_ids"])
    loss = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(loss, model(**batch).loss)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_model, lay_out):
    for patch_layer in ("linear", "unet"):
        model = make_model(patch_layer=patch_layer).train()
        batch = batch_of(model, lay_out, DOCUMENTS)
        grads, losses = [], []
        for enable in (False, True):
            if enable:
                model.activation_checkpointing_enable()
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss)
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*losses)
        assert grads[0].keys() == grads[1].keys()
        for name in grads[0]:
            torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


def test_training_draws_noise_and_timesteps_itself_where_none_are_given(make_model, lay_out):
    model = make_model().train()
    batch = batch_of(model, lay_out, DOCUMENTS)
    del batch["noise"], batch["timesteps"]
    assert model(**batch).loss.isfinite()


def tiny_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_text_logits_equal_llamas_exactly(tmp_path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path)
    model = TransfusionForConditionalGeneration.from_llama(
        str(tmp_path), boi_token_id=38, eoi_token_id=39, image_token_id=40, image_size=8
    ).eval()
    ids = torch.randint(38, (2, 13))
    assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, llama(input_ids=ids, attention_mask=mask).logits
    )
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [38, 39, 40]}
    ours = model.generate(ids, **greedy)
    assert torch.equal(ours, llama.generate(ids, **greedy))


def test_tokens_beyond_llamas_vocabulary_are_grown_and_the_others_stay(tmp_path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path)
    model = TransfusionForConditionalGeneration.from_llama(
        str(tmp_path), boi_token_id=41, eoi_token_id=42, image_token_id=43, image_size=8
    ).eval()
    assert model.config.text_config.vocab_size == 44 and model.get_input_embeddings().num_embeddings == 44
    ids = torch.randint(41, (2, 13))
    torch.testing.assert_close(model(input_ids=ids).logits[..., :41], llama(input_ids=ids).logits, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "grown")
    again = TransfusionForConditionalGeneration.from_pretrained(tmp_path / "grown").eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_from_llama_refuses_another_architecture(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=12, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2"):
        TransfusionForConditionalGeneration.from_llama(str(tmp_path), boi_token_id=1, eoi_token_id=2, image_token_id=3)


def test_a_llama_checkpoint_is_not_loaded_as_transfusion(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'.*from_llama"):
        TransfusionForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        TransfusionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("patch_layer", ["linear", "unet"])
def test_a_saved_model_loads_with_the_same_outputs(make_model, lay_out, tmp_path, patch_layer):
    model = make_model(patch_layer=patch_layer)
    batch = batch_of(model, lay_out, DOCUMENTS)
    model.save_pretrained(tmp_path)
    again = TransfusionForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    assert again.config.to_diff_dict().keys() >= {"text_config", "image_size", "drawing_guidance_scale"}
    for name in (
        "patch_layer",
        "patch_size",
        "unet_block_out_channels",
        "image_size",
        "boi_token_id",
        "prediction_type",
    ):
        assert getattr(again.config, name) == getattr(model.config, name)
    backbone = TransfusionModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 11, 12]])
    assert torch.equal(backbone(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)


def test_tied_embeddings_stay_tied(make_model, tmp_path):
    model = make_model(text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = TransfusionForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_the_vae_scales_and_shifts_and_brings_its_channels(make_model, tiny_vae):
    model = make_model(vae_config=tiny_vae)
    assert model.config.latent_channels == 5 and model.config.vae_stride == 2 and model.config.image_stride == 4
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = model.model.encode_pixels(pixels)
    assert latents.shape == (2, 5, 4, 6)
    expected = (model.vae.encode(pixels).latent_dist.mean - 0.3) * 0.7
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(model.decode_image_tokens(latents), model.vae.decode(latents / 0.7 + 0.3).sample)
    sampled = [model.model.encode_pixels(pixels, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_a_picture_is_encoded_alike_alone_and_beside_a_larger_one(make_model, tiny_vae):
    model = make_model(vae_config=tiny_vae)
    small, large = torch.rand(1, 3, 4, 8) * 2 - 1, torch.rand(1, 3, 12, 8) * 2 - 1
    padded = torch.cat([torch.nn.functional.pad(small, (0, 0, 0, 8)), large])
    latents = model.model.encode_pixels(padded, torch.tensor([[2, 4], [6, 4]]))
    torch.testing.assert_close(latents[:1, :, :2], model.model.encode_pixels(small))
    torch.testing.assert_close(latents[1:], model.model.encode_pixels(large))


def test_the_vae_is_frozen_in_training_and_after_loading(make_model, lay_out, tiny_vae, tmp_path):
    make_model(vae_config=tiny_vae).save_pretrained(tmp_path)
    for model in (make_model(vae_config=tiny_vae), TransfusionForConditionalGeneration.from_pretrained(tmp_path)):
        model.train()
        assert not any(module.training for module in model.vae.modules())
        assert not any(weight.requires_grad for weight in model.vae.parameters())
        batch = batch_of(model, lay_out, [[BOS, 11, (4, 6), EOS]])
        size = batch.pop("image_sizes")
        del batch["latents"]
        model(**batch, pixel_values=torch.rand(1, 3, *(2 * size[0]).tolist())).loss.backward()
        assert all(weight.grad is None for weight in model.vae.parameters())
        assert model.lm_head.weight.grad is not None


def test_the_vae_survives_saving(make_model, tiny_vae, tmp_path):
    model = make_model(vae_config=tiny_vae)
    model.save_pretrained(tmp_path)
    again = TransfusionForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[name], weight), name


def test_a_pretrained_vae_is_taken_over_with_its_weights(make_config, tiny_vae, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**tiny_vae)
    vae.save_pretrained(tmp_path)
    config = make_config()
    config.set_image_tokenizer(str(tmp_path))
    model = TransfusionForConditionalGeneration(config)
    model.load_image_tokenizer(str(tmp_path))
    pixels = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(model.model.encode_pixels(pixels), (vae.encode(pixels).latent_dist.mean - 0.3) * 0.7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_bf16_autocast_and_bf16_weights_train_on_pictures(make_model, lay_out, tiny_vae, prediction_type):
    model = make_model(vae_config=tiny_vae, prediction_type=prediction_type).train()
    batch = batch_of(model, lay_out, [[BOS, 11, (4, 6), EOS]])
    del batch["latents"], batch["image_sizes"]
    batch["pixel_values"] = torch.rand(1, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    expected = model(**batch).loss
    assert loss.dtype == torch.float32 and abs(loss - expected) < 0.1 * expected
    model = model.to(torch.bfloat16)
    model(**batch).loss.backward()


def test_raw_pixels_pass_through(make_model):
    model = make_model()
    pixels = torch.rand(1, 3, 4, 6)
    assert model.vae is None and model.config.image_stride == 2
    assert torch.equal(model.model.encode_pixels(pixels), pixels)
    assert torch.equal(model.decode_image_tokens(pixels), pixels)


def test_pictures_given_without_timesteps_are_read_clean(make_model, lay_out):
    model = make_model()
    ids = torch.tensor([lay_out(model.config, BOS, A, 11)])
    pixels = torch.rand(1, 3, *A)
    clean = model.model(input_ids=ids, latents=pixels, timesteps=torch.tensor([0])).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, model.lm_head(clean))


@pytest.mark.parametrize(
    ("sizes", "parts", "match"),
    [
        ([A], [BOS, A, A], "placeholders"),
        ([A, B], [BOS, A], "placeholders"),
        ([A, B], [BOS, B, A], "lengths of the images"),
        ([B, B], [BOS, (4, 4)], "lengths of the images"),
        ([(3, 4)], [BOS, (3, 4)], "multiples of 2"),
    ],
)
def test_images_that_do_not_fit_their_placeholders_are_refused(make_model, lay_out, sizes, parts, match):
    model = make_model()
    ids = lay_out(model.config, *parts)
    with pytest.raises(ValueError, match=match):
        hidden_states(model, ids, [torch.randn(3, *size) for size in sizes], [0] * len(sizes))


def test_cached_reading_with_an_image_in_the_second_part_equals_one_pass(make_model, lay_out):
    model = make_model().double()
    ids = torch.tensor([lay_out(model.config, BOS, B, 11, 12, A, 13)])
    images = [torch.randn(3, *B).double(), torch.randn(3, *A).double()]
    latents, sizes = pad_images(images)
    whole = model(input_ids=ids, latents=latents, image_sizes=sizes).logits
    cut = 7
    first = model(input_ids=ids[:, :cut], latents=latents[:1], image_sizes=sizes[:1])
    second = model(
        input_ids=ids[:, cut:], latents=latents[1:], image_sizes=sizes[1:], past_key_values=first.past_key_values
    )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_lora_trains_on_the_image_loss(make_model, lay_out):
    from peft import LoraConfig, get_peft_model

    model = make_model()
    batch = batch_of(model, lay_out, [[BOS, 11, A, EOS], [BOS, B, 12, EOS]])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=None)).train()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(weights) == 2 * 2 * model.config.text_config.num_hidden_layers
    optimizer = torch.optim.AdamW(weights, lr=3e-2)
    losses = []
    for _ in range(12):
        loss = adapted(**batch).image_loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_four_rows_are_learnt_by_heart(make_model, lay_out):
    model = make_model(text_config={"initializer_range": 0.1}).train()
    batch = batch_of(model, lay_out, DOCUMENTS)
    batch["timesteps"] = torch.full_like(batch["timesteps"], 999)  # here the target is the picture itself, nearly
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(80):
        out = model(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.text_loss < 0.4 and out.image_loss < 0.3  # text has two equally likely beginnings


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("patch_positions", ["running", "grid", "rotary"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_training_forward_compiles_without_graph_breaks(make_model, lay_out, packed, patch_positions):
    model = make_model(patch_positions=patch_positions).train()
    batch = batch_of(model, lay_out, [[BOS, 11, A, 12, EOS], [BOS, A, 13, 14, EOS]])
    del batch["image_sizes"]
    if packed:
        length = batch.pop("attention_mask").shape[1]
        batch["position_ids"] = torch.arange(length)[None].expand(2, -1).contiguous()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).loss, model(**batch, use_cache=False).loss)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("patch_positions", ["running", "rotary"])
def test_one_graph_serves_any_number_of_images_and_windows(make_model, lay_out, patch_positions):
    model = make_model(patch_positions=patch_positions).train()
    document = lay_out(model.config, BOS, 11, (4, 6), 12, EOS)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for num_windows, num_images in ((2, 4), (3, 6), (4, 6), (3, 5), (5, 9)):
        texts = [2 * len(document)] * num_windows
        for window in range(2 * num_windows - num_images):
            texts[window] = len(document)  # the other half holds text alone
        ids = torch.tensor([(document * 2)[:length] + [11] * (2 * len(document) - length) for length in texts])
        batch = {
            "input_ids": ids,
            "labels": ids.masked_fill(ids == model.config.image_token_id, -100),
            "position_ids": torch.arange(len(document)).repeat(2).repeat(num_windows, 1),
            "latents": torch.randn(num_images, 3, 4, 6),
            "timesteps": torch.arange(num_images) * 100,
            "noise": torch.randn(num_images, 3, 4, 6),
        }
        torch.testing.assert_close(compiled(**batch, use_cache=False).loss, model(**batch, use_cache=False).loss)
    assert counter.frame_count == 2  # of the first sizes, then of all


class HostWaits(TorchDispatchMode):
    """Notes every reading of a value on the device, each of which makes the host wait for all work given before."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.events.append("wait")
        return func(*args, **(kwargs or {}))


def test_training_waits_for_the_device_only_before_the_long_work(make_model, lay_out):
    model = make_model().train()
    document = lay_out(model.config, BOS, 11, (4, 6), 12, EOS)
    ids = torch.tensor([document * 2])
    positions = torch.arange(len(document)).repeat(2)[None]
    with HostWaits() as waits:
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(lambda *_: waits.events.append("layer"))
        model(input_ids=ids, labels=ids, position_ids=positions, latents=torch.randn(2, 3, 4, 6)).loss.backward()
    assert waits.events == ["wait"] * 3 + ["layer"] * 3  # one is the library's, which looks for packed documents


def test_each_layer_of_the_unet_begins_with_the_spread_of_its_fan_in(make_config):
    torch.manual_seed(0)
    model = TransfusionForConditionalGeneration(make_config(patch_layer="unet")).model
    for part in (model.patch_in, model.patch_out):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                bound = layer.weight[0].numel() ** -0.5
                assert 0.7 * bound < layer.weight.abs().max() <= bound
    projection = model.language_model.layers[0].self_attn.q_proj.weight
    assert projection.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
