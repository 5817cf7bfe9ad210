import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import VQModel
from diffusers.training_utils import EMAModel

from hf_mm.training import image_tokenizer_codecs
from hf_mm.training.codebook import CodebookUpkeep, draw_codes, measure_usage, summarize_usage
from hf_mm.training.image_tokenizer import ImageTokenizerTrainer, ImageTokenizerWeights, PatchDiscriminator
from hf_mm.training.image_tokenizer_arguments import ImageTokenizerArguments
from hf_mm.training.image_tokenizer_codecs import VQCodec, find_codes, save_reconstructions
from hf_mm.training.loop import TrainingProgress


NUM_CODES, CODE_LENGTH, LATENT_CHANNELS = 13, 5, 3


def make_vq(**fields: object) -> VQModel:
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 16), "latent_channels": LATENT_CHANNELS, "norm_num_groups": 4}
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=NUM_CODES,
        vq_embed_dim=CODE_LENGTH,
        **(settings | fields),
    )
    torch.nn.init.normal_(vq.quantize.embedding.weight, 0.0, 0.3)
    return vq


def make_images(num_images: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.rand((num_images, 3, 12, 20), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_upkeep(codec: VQCodec, **fields: object) -> CodebookUpkeep:
    settings = {"ema": None, "averaged": [*codec.parameters()], "progress": TrainingProgress(), "seed": 3}
    settings |= {
        "read_images": lambda generator: make_images(seed=torch.randint(99, (1,), generator=generator).item())
    }
    return CodebookUpkeep(codec, **(settings | fields))


# Spatial norms look at the codes, in 32 groups and with as many channels as the latent has.
SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 64), "latent_channels": CODE_LENGTH}


@pytest.mark.parametrize("fields", [{}, {"lookup_from_codebook": True}, SPATIAL], ids=["group", "lookup", "spatial"])
@torch.no_grad()
def test_codec_reconstructs_as_the_tokenizer_will(fields: dict) -> None:
    vq, images = make_vq(**fields), make_images()
    reconstruction, loss = VQCodec(vq)(images)
    torch.testing.assert_close(reconstruction, vq(images).sample)
    assert loss.shape == (7,)


def test_codebook_and_commitment_reach_codes_and_encoder_with_their_own_weights() -> None:
    vq, images = make_vq(), make_images()
    codec = VQCodec(vq, commitment_weight=0.3)
    latents = vq.encode(images).latents
    entries = vq.quantize.embedding(find_codes(vq, latents)).permute(0, 3, 1, 2)
    codec(images)[1].mean().backward()
    codes_gradient, encoder_gradient = vq.quantize.embedding.weight.grad.clone(), vq.quant_conv.weight.grad.clone()
    vq.zero_grad()
    ((entries - latents.detach()) ** 2).mean().backward(retain_graph=True)
    torch.testing.assert_close(codes_gradient, vq.quantize.embedding.weight.grad)
    vq.zero_grad()
    (0.3 * (entries.detach() - latents) ** 2).mean().backward()
    torch.testing.assert_close(encoder_gradient, vq.quant_conv.weight.grad)


def test_gradient_of_the_reconstruction_passes_the_codes_by() -> None:
    vq = make_vq()
    codec = VQCodec(vq)
    codec(make_images())[0].square().mean().backward()
    assert vq.quantize.embedding.weight.grad is None or not vq.quantize.embedding.weight.grad.any()
    assert vq.encoder.conv_in.weight.grad.abs().sum() > 0


def test_micro_batches_add_up_to_the_batch() -> None:
    trainer = ImageTokenizerTrainer(VQCodec(make_vq()), PatchDiscriminator(8, 1), ImageTokenizerWeights(latent=1.0))
    images, count = make_images(), torch.tensor(7)
    whole = trainer(images, num_images_in_batch=count)
    parts = [trainer(part, num_images_in_batch=count) for part in (images[:3], images[3:])]
    for name in ("loss", "reconstruction_loss", "latent_loss"):
        torch.testing.assert_close(whole[name], parts[0][name] + parts[1][name])
    torch.testing.assert_close(whole.loss, whole.reconstruction_loss + whole.latent_loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_are_the_nearest_however_many_are_searched_at_a_time(autocast: bool, monkeypatch) -> None:
    vq = make_vq()
    vq.quantize.embedding = torch.nn.Embedding(512, CODE_LENGTH)  # so many that half the precision mistakes some
    latents = torch.randn(7, CODE_LENGTH, 5, 6)
    codes = vq.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])
    distances = (latents.movedim(1, -1)[..., None, :] - vq.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    for at_a_time in (2**22, 1):
        monkeypatch.setattr(image_tokenizer_codecs, "MAX_DISTANCES", at_a_time)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(find_codes(vq, latents), codes)


def test_codes_are_counted_in_training_alone() -> None:
    codec, images = VQCodec(make_vq()), make_images()
    codes = find_codes(codec.vq, codec.vq.encode(images).latents)
    for _ in range(2):
        codec.train()(images)
    codec.eval()(images)
    assert torch.equal(codec.code_counts, 2 * torch.bincount(codes.flatten(), minlength=NUM_CODES))
    assert "code_counts" in codec.state_dict()  # so that a resumed run has them


def test_usage_is_share_and_perplexity() -> None:
    usage = summarize_usage(torch.tensor([5, 0, 5, 0, 5]))
    assert usage.used_share == pytest.approx(3 / 5) and usage.perplexity == pytest.approx(3)
    shares = torch.tensor([0.7, 0.2, 0.1])
    wanted = math.exp(-sum(share * math.log(share) for share in shares.tolist()))
    assert summarize_usage((shares * 1000).round().long()).perplexity == pytest.approx(wanted)
    assert summarize_usage(torch.zeros(4, dtype=torch.long)) == (0, 1)
    vq, images = make_vq(), make_images()
    assert measure_usage(vq, images.split(3)) == measure_usage(vq, [images])
    assert measure_usage(vq, [images]).used_share > 1 / NUM_CODES


def test_codes_are_drawn_from_latents_in_proportion_to_their_squared_distance() -> None:
    vq = make_vq()
    with torch.no_grad():
        vq.quantize.embedding.weight.zero_()
    latents = torch.zeros(1, CODE_LENGTH, 2, 2)
    latents[0, 0] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_codes(vq, latents, 1, generator)[0, 0] for _ in range(2800)])
    counts = torch.bincount(drawn.long(), minlength=4)
    assert counts[0] == 0 and torch.allclose(counts[1:] / 2800, torch.tensor([1, 4, 9]) / 14, atol=0.03)
    assert sorted(draw_codes(vq, latents, 9, generator)[:, 0].tolist()) == [1, 2, 3]  # what is a code is drawn no more
    assert draw_codes(vq, torch.zeros(1, CODE_LENGTH, 2, 2), 4, generator).shape == (0, CODE_LENGTH)


def test_what_was_drawn_counts_for_what_is_drawn_next() -> None:
    vq = make_vq()
    with torch.no_grad():
        vq.quantize.embedding.weight.zero_()
    latents = torch.zeros(1, CODE_LENGTH, 9, 10)
    latents[0, 0] = 5 + torch.rand(9, 10, generator=torch.Generator().manual_seed(1)) / 100  # a plain background
    latents[0, 0, 4, 4:6] = torch.tensor([7.0, 9.0])
    for seed in range(20):
        drawn = draw_codes(vq, latents, 3, torch.Generator().manual_seed(seed))
        assert sorted(drawn[:, 0].round().tolist()) == [5, 7, 9]


def test_codes_to_be_replaced_do_not_count_as_codes() -> None:
    """Else what lies near one of them would be drawn by none, and lose it."""
    vq = make_vq()
    far, here = torch.full((CODE_LENGTH,), 100.0), torch.zeros(CODE_LENGTH)
    here[0] = 5.0
    is_dead = torch.ones(NUM_CODES, dtype=torch.bool)
    is_dead[0] = False
    with torch.no_grad():
        vq.quantize.embedding.weight[:] = far
        vq.quantize.embedding.weight[:2] = torch.stack([torch.zeros(CODE_LENGTH), here])
    latents = torch.zeros(1, CODE_LENGTH, 2, 3)
    latents[0, 0] = torch.tensor([[0.0, 5.0, 5.0], [0.0, 6.0, 7.0]])
    drawn = draw_codes(vq, latents, 3, torch.Generator().manual_seed(0), is_dead=is_dead)
    assert sorted(drawn[:, 0].tolist()) == [5, 6, 7]
    vq.encode = lambda images: SimpleNamespace(latents=latents)
    codec = VQCodec(vq)
    codec.code_counts[:] = ~is_dead
    make_upkeep(codec)(20)
    assert {0, 5, 6, 7} <= {*vq.quantize.embedding.weight[:, 0].tolist()}


def test_local_codes_learn_from_their_own_pixels_and_not_from_the_decoder() -> None:
    vq, images = make_vq(), make_images()
    codec = VQCodec(vq, local_codes=True)
    for codec.is_quantizing in (True, False):
        reconstruction, cost = codec(images)
        plain = VQCodec(vq)
        plain.is_quantizing = codec.is_quantizing
        torch.testing.assert_close(reconstruction, plain(images)[0])
        reconstruction.square().mean().backward(retain_graph=True)
        assert vq.encoder.conv_in.weight.grad is None and vq.decoder.conv_out.weight.grad.abs().sum() > 0
        cost.mean().backward()
        assert vq.encoder.conv_in.weight.grad.abs().sum() > 0
        codec.zero_grad()
    plain = VQCodec(vq)(images)[1]
    codec.is_quantizing = True
    with torch.no_grad():
        own = codec.own_pixels(vq.quantize.embedding(find_codes(vq, vq.encode(images).latents)).permute(0, 3, 1, 2))
        expected = plain + (own - images).abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(codec(images)[1], expected)
        changed = torch.zeros(1, CODE_LENGTH, 3, 5)
        changed[..., 1, 2] = 1.0
        told = (codec.own_pixels(changed) - codec.own_pixels(torch.zeros_like(changed))).abs().sum(dim=(0, 1))
    stride = images.shape[-1] // vq.encode(images).latents.shape[-1]
    assert told[stride : 2 * stride, 2 * stride : 3 * stride].sum() == told.sum() > 0


def test_local_codes_are_refused_where_there_are_no_codes() -> None:
    with pytest.raises(ValueError, match="local_codes.*image_tokenizer_class.*AutoencoderKL.*VQModel"):
        ImageTokenizerArguments(local_codes=True)
    assert ImageTokenizerArguments(image_tokenizer_class="VQModel", local_codes=True).local_codes


def test_only_dead_codes_are_revived_and_the_average_takes_them_as_they_are() -> None:
    codec = VQCodec(make_vq())
    parameters = [*codec.parameters()]
    ema, progress = EMAModel(parameters, decay=0.9), TrainingProgress()
    upkeep = make_upkeep(codec, ema=ema, averaged=parameters, progress=progress)
    codec.code_counts[:] = torch.arange(NUM_CODES) % 3
    weight = codec.vq.quantize.embedding.weight
    shadow = next(s for s, p in zip(ema.shadow_params, parameters, strict=True) if p is weight)
    shadow += 1
    before, before_shadow, usage = weight.clone(), shadow.clone(), summarize_usage(codec.code_counts)
    upkeep(20)
    dead = torch.arange(NUM_CODES) % 3 == 0
    assert torch.equal(weight[~dead], before[~dead]) and torch.equal(shadow[~dead], before_shadow[~dead])
    assert (weight[dead] != before[dead]).any(dim=1).all() and torch.equal(weight[dead], shadow[dead])
    assert not codec.code_counts.any()
    assert progress.take_means() == {"used_code_share": usage.used_share, "code_perplexity": usage.perplexity}


def test_revived_codes_follow_from_seed_and_step() -> None:
    def revive(seed: int, step: int) -> torch.Tensor:
        codec = VQCodec(make_vq())
        torch.rand(seed + step)  # the global state does not matter
        make_upkeep(codec, seed=seed)(step)
        return codec.vq.quantize.embedding.weight.detach()

    assert torch.equal(revive(3, 20), revive(3, 20))
    assert not torch.equal(revive(3, 20), revive(4, 20)) and not torch.equal(revive(3, 20), revive(3, 40))


def test_before_the_first_step_all_codes_are_drawn_and_after_the_last_none() -> None:
    codec, progress = VQCodec(make_vq()), TrainingProgress()
    upkeep = make_upkeep(codec, progress=progress, last_revival_step=50)
    before = codec.vq.quantize.embedding.weight.clone()
    upkeep(0)
    drawn = codec.vq.quantize.embedding.weight.clone()
    assert (drawn != before).any(dim=1).all() and progress.take_means() == {}
    upkeep(60)
    assert torch.equal(codec.vq.quantize.embedding.weight, drawn)
    assert progress.take_means() == {"used_code_share": 0, "code_perplexity": 1}


def test_until_quantization_begins_latents_pass_as_they_are() -> None:
    codec, progress, images = VQCodec(make_vq()), TrainingProgress(), make_images()
    upkeep = make_upkeep(codec, progress=progress, first_quantized_step=40, last_revival_step=30)
    before = codec.vq.quantize.embedding.weight.clone()
    upkeep(20)
    reconstruction, loss = codec(images)
    latents = codec.vq.encode(images).latents
    torch.testing.assert_close(reconstruction, codec.vq.decode(latents, force_not_quantize=True).sample)
    assert not loss.any() and torch.equal(codec.vq.quantize.embedding.weight, before) and not codec.code_counts.any()
    upkeep(40)
    assert (codec.vq.quantize.embedding.weight != before).any(dim=1).all() and progress.take_means() == {}
    torch.testing.assert_close(codec(images)[0], codec.vq(images).sample)
    for step, is_quantizing in ((39, False), (40, True), (41, True)):
        make_upkeep(codec, progress=TrainingProgress(step=step), first_quantized_step=40)
        assert codec.is_quantizing == is_quantizing


def test_reconstructions_are_drawn_from_codes(tmp_path) -> None:
    save_reconstructions(make_vq(lookup_from_codebook=True), make_images(2), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 500
