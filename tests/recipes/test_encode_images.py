import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, VQModel
from PIL import Image

import encode_images
from hf_mm.data.formats import load_rows
from hf_mm.data.image_encoding import load_encoded
from hf_mm.data.mixing import DocumentArguments, SampleKey
from hf_mm.data.sources import DatasetArguments, open_rows
from hf_mm.data.training_documents import NoisedDocuments


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "encode_images.py"
NUM_ROWS, IMAGE_SIZE, CHANNELS = 7, 12, 3


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (17, 23 + number, 3), dtype=np.uint8)) for number in range(NUM_ROWS)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    captions = [f"picture {number}" for number in range(NUM_ROWS)]
    Dataset.from_dict({"image": images, "caption": captions}).to_parquet(path)
    return str(path)


def save_vae(folder: Path, scaling_factor: float | None) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 6),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=CHANNELS,
        scaling_factor=scaling_factor,
        shift_factor=0.3,
    )
    vae.save_pretrained(folder)
    return vae.eval()


def arguments(rows_file: str, output_dir: Path, *more: object) -> list[str]:
    fixed = ["--dataset_name", rows_file, "--text_column", "caption", "--output_dir", output_dir]
    return [str(word) for word in [*fixed, "--image_size", IMAGE_SIZE, "--batch_size", 2, "--num_shards", 3, *more]]


def pictures(rows_file: str) -> torch.Tensor:
    """The pictures as the encoder must see them, (N, 3, H, W) in [-1, 1]."""
    rows = load_rows(rows_file, text_column="caption").with_format(None)
    documents = NoisedDocuments(
        rows, processor=None, image_size=IMAGE_SIZE, latent_shape=(3, IMAGE_SIZE, IMAGE_SIZE), sample_timesteps=None,
        arguments=DocumentArguments(), seed=0,
    )  # fmt: skip
    return torch.stack([documents._read_image(row, {}, torch.Generator()) for row in rows])


def test_latents_are_those_of_the_tokenizer_shifted_and_scaled(rows_file: str, tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae", 0.7)
    folder = encode_images.main(arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae"))
    rows = load_encoded(folder)
    with torch.no_grad():
        posterior = vae.encode(pictures(rows_file)).latent_dist
    assert rows[:]["latent_mean"].shape == (NUM_ROWS, CHANNELS, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    assert rows[:]["latent_mean"].dtype == np.float16
    wanted = {"latent_mean": (posterior.mean - 0.3) * 0.7, "latent_std": posterior.std * 0.7}
    for name, values in wanted.items():
        assert np.allclose(rows[:][name], values, atol=2e-3)
    assert rows["text"][:] == [f"picture {number}" for number in range(NUM_ROWS)]
    assert not (folder / "image_tokenizer").exists()


def test_a_missing_latent_scale_is_measured_and_kept_with_the_tokenizer(
    rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vae = save_vae(tmp_path / "vae", None)
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae")
    folder = encode_images.main(options)
    with torch.no_grad():
        posterior = vae.encode(pictures(rows_file)).latent_dist
    noise = torch.randn(997, *posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    spread = (posterior.mean + posterior.std * noise).std().item()
    scale = json.loads((folder / "manifest.json").read_text())["encoder"]["scaling_factor"]
    assert scale == pytest.approx(1 / spread, rel=0.01)
    assert f"measured {scale:.5f} on {NUM_ROWS} pictures" in capsys.readouterr().out
    kept = AutoencoderKL.from_pretrained(folder / "image_tokenizer")
    assert kept.config.scaling_factor == scale
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(kept.parameters(), vae.parameters(), strict=True))
    sample = load_encoded(folder)[:]
    assert np.sqrt(sample["latent_mean"].astype(float).var() + (sample["latent_std"] ** 2).mean()) == pytest.approx(
        1, rel=0.01
    )
    encode_images.main(options)  # finds all done, with the same scale


def test_a_run_killed_while_it_keeps_the_tokenizer_goes_on(
    rows_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vae(tmp_path / "vae", None)
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae")

    def die(vae: AutoencoderKL, folder: Path) -> None:
        vae.save_config(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoencoderKL, "save_pretrained", die)
        encode_images.main(options)
    folder = encode_images.main(options)
    assert len(load_encoded(folder)) == NUM_ROWS and not (folder / "image_tokenizer.tmp").exists()


def test_other_weights_under_the_same_name_are_refused(rows_file: str, tmp_path: Path) -> None:
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae")
    vae = save_vae(tmp_path / "vae", 0.7)
    encode_images.main(options)
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="holds images encoded otherwise: `encoder` was"):
        encode_images.main(options)


def test_without_a_tokenizer_pixels_are_kept_as_they_are(rows_file: str, tmp_path: Path) -> None:
    rows = load_encoded(encode_images.main(arguments(rows_file, tmp_path / "out")))
    assert rows[:]["pixels"].dtype == np.uint8
    assert np.array_equal(rows[:]["pixels"] / np.float32(127.5) - 1, pictures(rows_file))


def save_vq(folder: Path) -> VQModel:
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(4, 6),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=CHANNELS,
        num_vq_embeddings=31,
    )
    torch.nn.init.normal_(vq.quantize.embedding.weight, 0.0, 0.3)
    vq.save_pretrained(folder)
    return vq.eval()


def test_codes_are_those_of_the_tokenizer_row_by_row(rows_file: str, tmp_path: Path) -> None:
    vq = save_vq(tmp_path / "vq")
    folder = encode_images.main(arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vq"))
    codes = load_encoded(folder)[:]["codes"]
    assert codes.shape == (NUM_ROWS, (IMAGE_SIZE // 2) ** 2) and 0 <= codes.min() < codes.max() < 31
    side = IMAGE_SIZE // 2
    grid = torch.from_numpy(codes).long().view(NUM_ROWS, side, side)
    with torch.no_grad():
        entries = vq.quantize.embedding(grid).permute(0, 3, 1, 2)
        ours, wanted = vq.decode(entries, force_not_quantize=True).sample, vq(pictures(rows_file)).sample
    assert torch.allclose(ours, wanted, atol=1e-4)
    rows = load_encoded(folder)
    assert rows["text"][:] == [f"picture {number}" for number in range(NUM_ROWS)] and "image" not in rows.column_names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stride"] == 2 and manifest["encoder"]["num_codes"] == 31
    assert manifest["encoder"]["code_grid"] == [side, side] and len(manifest["encoder"]["weights"]) == 32


def test_codes_of_another_codebook_are_refused_and_a_cut_off_run_is_finished(rows_file: str, tmp_path: Path) -> None:
    vq = save_vq(tmp_path / "vq")
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vq")
    folder = encode_images.main(options)
    wanted = load_encoded(folder)[:]["codes"]
    (folder / "shard-00001-of-00003.arrow").unlink()
    assert np.array_equal(load_encoded(encode_images.main(options))[:]["codes"], wanted)
    with torch.no_grad():
        vq.quantize.embedding.weight[7] += 1
    vq.save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="holds images encoded otherwise: `encoder` was"):
        encode_images.main(options)


def test_a_tokenizer_of_another_class_is_refused(rows_file: str, tmp_path: Path) -> None:
    AsymmetricAutoencoderKL(
        down_block_out_channels=(4,), up_block_out_channels=(4,), norm_num_groups=2
    ).save_pretrained(tmp_path / "other")
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "other")
    with pytest.raises(ValueError, match="is of class AsymmetricAutoencoderKL. Name an AutoencoderKL or a VQModel"):
        encode_images.main(options)


def test_a_size_off_the_grid_is_refused(rows_file: str, tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", 0.7)
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae", "--patch_size", 4)
    with pytest.raises(ValueError, match=r"`image_size`=12: the height 12 must be a multiple of `stride`=8. Try 8."):
        encode_images.main(options)


def test_encoded_rows_of_another_size_or_split_are_refused(rows_file: str, tmp_path: Path) -> None:
    folder = str(encode_images.main(arguments(rows_file, tmp_path / "out")))
    assert len(open_rows(DatasetArguments(dataset_name=folder), image_size=IMAGE_SIZE)) == NUM_ROWS
    with pytest.raises(ValueError, match="encoded at 12 x 12 px, but 16 x 16 px are needed"):
        open_rows(DatasetArguments(dataset_name=folder), image_size=16)
    with pytest.raises(ValueError, match="`dataset_split`='validation': .* have no splits"):
        open_rows(DatasetArguments(dataset_name=folder, dataset_split="validation"), image_size=IMAGE_SIZE)


def test_embedded_scenes_of_several_splits_stand_one_behind_the_other() -> None:
    def words(split: str) -> list[str]:
        rows = open_rows(DatasetArguments(dataset_split=split, num_scenes=7), image_size=16)
        return [*rows["description"]]

    train, held_out = words("train"), words("validation")
    assert words("train+validation") == train + held_out and len({*train, *held_out}) == 14
    assert words("train+validation[:3]") == train + held_out[:3] and words("train[2:4]") == train[2:4]
    with pytest.raises(ValueError, match="`dataset_split`='test' of icon scenes: .*'train', 'validation'"):
        words("test")
    with pytest.raises(ValueError, match=r"`dataset_split`='train\[9:\]' takes nothing of the 7 scenes of 'train'"):
        words("train[9:]")


class Processor:
    """Lays out nothing but the sizes of images."""

    def encode_document(self, content: list[dict]) -> dict:
        return {"input_ids": [part["size"] for part in content if part["type"] == "image"], "labels": []}


def build_documents(rows: Dataset, latent_shape: tuple[int, int, int]) -> NoisedDocuments:
    return NoisedDocuments(
        rows, processor=Processor(), image_size=IMAGE_SIZE, latent_shape=latent_shape, seed=0,
        sample_timesteps=lambda number, **_: torch.zeros(number), arguments=DocumentArguments(),
    )  # fmt: skip


def test_noise_has_the_shape_of_latents_whatever_the_rows_hold(rows_file: str, tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", 0.7)
    raw = load_rows(rows_file, text_column="caption")
    pixels = load_encoded(encode_images.main(arguments(rows_file, tmp_path / "pixels")))
    options = arguments(rows_file, tmp_path / "latents", "--image_tokenizer_name", tmp_path / "vae")
    latents = load_encoded(encode_images.main(options))
    side = IMAGE_SIZE // 2
    for rows, image_shape in ((raw, (3, 12, 12)), (pixels, (3, 12, 12)), (latents, (CHANNELS, side, side))):
        document = build_documents(rows, (CHANNELS, side, side))[SampleKey(5, 0, 2)]
        assert document["images"][0].shape == image_shape
        assert document["noise"][0].shape == (CHANNELS, side, side) and document["input_ids"] == [(side, side)]
    for rows in (raw, pixels):  # a model on raw pixels
        document = build_documents(rows, (3, IMAGE_SIZE, IMAGE_SIZE))[SampleKey(5, 0, 2)]
        assert document["noise"][0].shape == document["images"][0].shape == (3, 12, 12)


def test_latents_are_drawn_anew_for_each_sample(rows_file: str, tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", 0.7)
    options = arguments(rows_file, tmp_path / "out", "--image_tokenizer_name", tmp_path / "vae")
    rows = load_encoded(encode_images.main(options))
    documents = build_documents(rows, (CHANNELS, IMAGE_SIZE // 2, IMAGE_SIZE // 2))
    drawn = torch.stack([documents[SampleKey(number, 0, 2)]["images"][0] for number in range(400)])
    assert np.allclose(drawn.mean(0), rows[2]["latent_mean"], atol=0.3 * rows[2]["latent_std"].max())
    assert np.allclose(drawn.std(0), rows[2]["latent_std"], rtol=0.25)


@pytest.mark.slow
def test_two_processes_encode_what_one_does(rows_file: str, tmp_path: Path) -> None:
    # Without ACCELERATE_USE_CPU, as a user on a CPU may start them.
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment["OMP_NUM_THREADS"] = "1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    save_vae(tmp_path / "vae", None)
    options = ("--image_tokenizer_name", tmp_path / "vae")
    result = subprocess.run(
        [*launcher, str(RECIPE), *arguments(rows_file, tmp_path / "two", *options)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("measured") == 1
    subprocess.run(
        [sys.executable, str(RECIPE), *arguments(rows_file, tmp_path / "one", *options)], env=environment, check=True
    )
    one, two = load_encoded(tmp_path / "one")[:], load_encoded(tmp_path / "two")[:]
    assert np.array_equal(one["latent_mean"], two["latent_mean"]) and one["text"] == two["text"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_pretraining_reads_what_was_encoded(rows_file: str, tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = {
        "model_type": "transfusion",
        "text_config": {"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 128, **sizes},
        "image_size": IMAGE_SIZE, "patch_size": 2, "prediction_type": "flow_prediction", "num_inference_steps": 2,
        "boi_token_id": 3, "eoi_token_id": 4, "image_token_id": 5,
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(config))
    save_vae(tmp_path / "vae", None)
    tokenizer = [] if kind == "pixels" else ["--image_tokenizer_name", tmp_path / "vae"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def run(name: str, *options: object) -> None:
        command = [sys.executable, str(ROOT / "recipes" / name), *map(str, options)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    run("encode_images.py", *arguments(rows_file, tmp_path / "out", "--patch_size", 2, *tokenizer))
    if kind == "latents":
        tokenizer = ["--image_tokenizer_name", tmp_path / "out" / "image_tokenizer"]
    run(
        "pretrain.py", "--config_name", tmp_path / "model.json", "--dataset_name", tmp_path / "out", *tokenizer,
        "--output_dir", tmp_path / "run", "--max_steps", 2, "--per_device_train_batch_size", 3, "--num_samples", 2,
        "--report_to", "none", "--mixed_precision", "no",
    )  # fmt: skip
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "samples.png").exists()
