import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from click.testing import Result
from datasets import Dataset
from PIL import Image
from typer.testing import CliRunner

import build_retrieval_index
from hf_mm import (
    CM3LeonConfig,
    CM3LeonForConditionalGeneration,
    CM3LeonPipeline,
    CM3LeonProcessor,
    TransfusionConfig,
    TransfusionForConditionalGeneration,
    TransfusionPipeline,
    TransfusionProcessor,
)
from hf_mm.cli import app
from hf_mm.cm3leon import extend_tokenizer
from hf_mm.data.text_tokenizer import train_text_tokenizer


IMAGE_SIZE = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = train_text_tokenizer(["a red star", "a blue heart"] * 3, 271)
    config = TransfusionConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 271,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 61,
        },
        image_size=IMAGE_SIZE,
        patch_size=2,
        prediction_type="flow_prediction",
        num_inference_steps=3,
        boi_token_id=3,
        eoi_token_id=4,
        image_token_id=5,
    )
    config.set_tokenizer(tokenizer)
    torch.manual_seed(0)
    model = TransfusionForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline = TransfusionPipeline(
        model, TransfusionProcessor.from_config(config, tokenizer), model.default_scheduler()
    )
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def code_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_vq: dict) -> str:
    """A CM3Leon checkpoint."""
    num_codes = tiny_vq["num_vq_embeddings"]
    tokenizer = extend_tokenizer(train_text_tokenizer(["a red star", "a blue heart"] * 3, 271), num_codes, 7)
    config = CM3LeonConfig(
        vocab_size=331,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=83,
        image_size=IMAGE_SIZE,
        image_vocab_size=num_codes,
        num_sentinel_tokens=7,
        first_image_token_id=0,
        first_sentinel_token_id=100,
        break_token_id=200,
        eoss_token_id=201,
        image_token_id=202,
        pad_token_id=203,
        eos_token_id=204,
        initializer_range=0.4,
        vq_config=tiny_vq,
    )
    config.set_tokenizer(tokenizer)
    torch.manual_seed(0)
    model = CM3LeonForConditionalGeneration(config)
    for layer in model.model.layers:  # zero at the beginning, when prompts have no effect yet
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.4)
    folder = tmp_path_factory.mktemp("code_checkpoint")
    CM3LeonPipeline(model, CM3LeonProcessor.from_config(config, tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def memory_dir(clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index over pictures of one colour each."""
    folder = tmp_path_factory.mktemp("memory")
    colours = [(37 * number % 256, 101 * number % 256, 11 * number) for number in range(19)]
    pictures = [Image.new("RGB", (13, 11), colour) for colour in colours]
    texts = [f"{'abcdefghijklmnopqrs'[number]} star" for number in range(19)]
    Dataset.from_dict({"image": pictures, "text": texts}).save_to_disk(folder / "rows")
    words = ["--dataset_name", folder / "rows", "--clip_name", clip_dir, "--output_dir", folder / "index"]
    words += ["--num_shards", 2, "--max_relevance", 1, "--max_similarity", 1]
    return str(build_retrieval_index.main([str(word) for word in words]))


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    before = [(library.utils.logging, library.utils.logging.get_verbosity()) for library in (transformers, diffusers)]
    yield
    for logging, verbosity in before:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def run(*arguments: object, lines: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=lines)


@pytest.fixture
def star(tmp_path: Path) -> Path:
    """A picture file."""
    path = tmp_path / "in" / "star.png"
    path.parent.mkdir()
    Image.radial_gradient("L").convert("RGB").save(path)
    return path


def failure(result: Result) -> str:
    """The one line that a failed command printed."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stdout == "" and result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_prompt_becomes_a_picture_and_its_place_is_printed(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "star.png"
    result = run("generate", "a red star", "--model", checkpoint, "--output", output, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output} (seed 5)\n"
    assert [path.name for path in output.parent.iterdir()] == ["star.png"]
    with Image.open(output) as picture:
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_several_prompts_and_pictures_are_numbered_and_each_has_its_seed(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "star.png"
    options = ["--model", checkpoint, "--output", output, "--seed", 5, "--num-images", 2, "--json"]
    result = run("generate", "a red star", "a blue heart", *options)
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"path": str(tmp_path / name), "prompt": prompt, "seed": seed}
        for name, prompt, seed in [
            ("star.png", "a red star", 5),
            ("star-1.png", "a red star", 6),
            ("star-2.png", "a blue heart", 7),
            ("star-3.png", "a blue heart", 8),
        ]
    ]
    alone = tmp_path / "alone.png"
    run("generate", "a blue heart", "--model", checkpoint, "--output", alone, "--seed", 7)
    together, single = Image.open(tmp_path / "star-2.png"), Image.open(alone)
    difference = max(abs(one - other) for one, other in zip(together.tobytes(), single.tobytes(), strict=True))
    assert difference <= 1  # of 255: the prompts are padded when drawn together
    assert single.tobytes() != Image.open(tmp_path / "star-3.png").tobytes()


def test_steps_guidance_and_size_reach_the_drawing(checkpoint: str, tmp_path: Path) -> None:
    def draw(name: str, *options: object) -> Image.Image:
        result = run("generate", "a red star", "--model", checkpoint, "-o", tmp_path / name, "--seed", 5, *options)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / name) as picture:
            return picture.copy()

    plain = draw("plain.png")
    assert draw("wide.webp", "--height", 4, "--width", 12).size == (12, 4)
    assert draw("again.png").tobytes() == plain.tobytes()
    assert draw("steps.png", "--num-inference-steps", 2).tobytes() != plain.tobytes()
    assert draw("scale.png", "--guidance-scale", 1).tobytes() != plain.tobytes()


def test_a_checkpoint_of_codes_draws_and_describes_by_the_same_commands(code_checkpoint: str, tmp_path: Path) -> None:
    options = ["--model", code_checkpoint, "--seed", 5, "--guidance-scale", 2, "--output", tmp_path / "star.png"]
    result = run("generate", "a red star", "a blue heart", "--num-images", 2, "--top-p", 0.9, *options)
    assert result.exit_code == 0, result.output
    assert [line.split("(")[1] for line in result.stdout.splitlines()] == [f"seed {seed})" for seed in (5, 6, 7, 8)]
    together = (tmp_path / "star-2.png").read_bytes()
    run("generate", "a blue heart", "--top-p", 0.9, *options, "--seed", 7)
    assert (tmp_path / "star.png").read_bytes() == together
    run("generate", "a blue heart", "--temperature", 9, *options, "--seed", 7)
    assert (tmp_path / "star.png").read_bytes() != together
    captioned = run("caption", tmp_path / "star.png", "--model", code_checkpoint, "--max-new-tokens", 4)
    assert captioned.exit_code == 0 and captioned.stdout.startswith(f"{tmp_path / 'star.png'}: ")


def test_options_of_the_other_family_are_refused(checkpoint: str, code_checkpoint: str, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "a.png"]
    message = failure(run("generate", "a", "--model", code_checkpoint, "--num-inference-steps", 3, *output))
    assert "--num-inference-steps: a CM3LeonPipeline has no such option" in message
    message = failure(run("generate", "a", "--model", checkpoint, "--top-p", 0.5, "--temperature", 2, *output))
    assert "--temperature, --top-p: a TransfusionPipeline has no such option" in message
    assert "`height`=4" in failure(run("generate", "a", "--model", code_checkpoint, "--height", 4, *output))


def test_what_is_retrieved_changes_the_drawing_and_is_told(
    code_checkpoint: str, memory_dir: str, tmp_path: Path
) -> None:
    def draw(*options: object) -> tuple[list[dict], list[bytes]]:
        fixed = ["--model", code_checkpoint, "--seed", 5, "--output", tmp_path / "star.png", "--json"]
        result = run("generate", "a red star", "b", *fixed, *options)
        assert result.exit_code == 0, result.output
        facts = [json.loads(line) for line in result.stdout.splitlines()]
        return facts, [Path(fact["path"]).read_bytes() for fact in facts]

    plain, without = draw()
    _, off = draw("--retrieval-dir", memory_dir, "--num-retrieved", 0)
    assert off == without and "retrieved" not in plain[0]
    facts, drawn = draw("--retrieval-dir", memory_dir, "--num-retrieved", 1)
    assert drawn[0] != without[0]
    for fact in facts:
        (found,) = fact["retrieved"]
        assert found["text"] == f"{'abcdefghijklmnopqrs'[found['id']]} star" and -1 <= found["score"] <= 1
    twice, other = draw("--retrieval-dir", memory_dir, "--num-images", 2, "--num-retrieved", 1)
    assert [fact["retrieved"] for fact in twice[::2]] == [fact["retrieved"] for fact in facts]
    assert other[0] == drawn[0]
    two, _ = draw("--retrieval-dir", memory_dir)
    assert [len(fact["retrieved"]) for fact in two] == [2, 2]
    assert all(fact["retrieved"][0]["score"] >= fact["retrieved"][1]["score"] for fact in two)


@pytest.mark.parametrize("family", ["checkpoint", "code_checkpoint"])
def test_a_picture_is_edited_and_its_place_is_printed(
    family: str, star: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, output = request.getfixturevalue(family), tmp_path / "new" / "blue.png"

    def draw(prompt: str, *options: object, image: Path = star) -> bytes:
        fixed = ["--model", model, "--seed", 5, "--output", output, "--guidance-scale", 2]
        result = run("edit", image, prompt, *fixed, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{output} (seed 5)\n"
        return output.read_bytes()

    plain = draw("a blue heart")
    assert draw("a blue heart") == plain
    other = star.with_name("other.png")
    Image.new("RGB", (9, 9), "red").save(other)
    changed = draw("a red star"), draw("a blue heart", "--image-guidance-scale", 4), draw("a<image>blue heart")
    assert plain not in (*changed, draw("a blue heart", image=other))
    result = run("edit", star, "a blue heart", "--model", model, "--output", output, "--json", "--seed", 7)
    facts = {"path": str(output), "image": str(star), "prompt": "a blue heart", "seed": 7}
    assert json.loads(result.stdout) == facts


def test_edits_that_cannot_be_are_refused_by_name(
    checkpoint: str, code_checkpoint: str, star: Path, tmp_path: Path
) -> None:
    output = ["--output", tmp_path / "a.png"]
    assert f"`{tmp_path}/no.png`" in failure(run("edit", tmp_path / "no.png", "a", "--model", "not/loaded", *output))
    star.with_name("text.png").write_text("no picture")
    assert "text.png" in failure(run("edit", star.with_name("text.png"), "a", "--model", "not/loaded", *output))
    for model, words in ((checkpoint, "positions; the model has 61"), (code_checkpoint, "the model has 83")):
        assert words in failure(run("edit", star, "star " * 50, "--model", model, *output))
        message = failure(run("edit", star, "<image>a<image>", "--model", model, *output))
        assert "`prompt`='<image>a<image>' has 2 '<image>'" in message
    message = failure(run("edit", star, "a", "--model", code_checkpoint, "--num-inference-steps", 3, *output))
    assert "--num-inference-steps: a CM3LeonPipeline has no such option" in message
    assert run("edit", star, "a", "--image-guidance-scale", 0.5).exit_code == 2
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("family", ["checkpoint", "code_checkpoint"])
def test_lines_are_a_conversation(family: str, star: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    options = [
        "--model",
        request.getfixturevalue(family),
        "--max-new-tokens",
        3,
        "--seed",
        5,
        "--output-dir",
        tmp_path,
    ]
    result = run("chat", *options, "--json", lines=f"/image {star}\nred\n\na heart\n/quit\nblue\n")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 2 and result.stderr == ""
    for answer in answers:
        assert answer["role"] == "assistant"
        for part in answer["content"]:
            assert part["type"] == "text" or Path(part["path"]).is_file()
    assert run("chat", *options, "--json", "--image", star, lines="red\na heart").exit_code == 0


def test_conversations_that_cannot_go_on_end_with_one_line(checkpoint: str, star: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no.png"
    assert f"`{missing}`" in failure(run("chat", "--model", "not/loaded", "--image", missing))
    for lines, words in (
        (f"/image {missing}", f"`{missing}`"),
        ("/image", "/image needs a path"),
        ("/draw", "There is no command /draw: /image PATH adds"),
        ("a <boi>", "special token '<boi>'"),
        ("star " * 70, "leaves no room"),
    ):
        assert words in failure(run("chat", "--model", checkpoint, lines=lines + "\nred\n"))


def test_a_model_that_is_nowhere_or_no_pipeline_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for name, words in ((tmp_path / "clip", "no model_index.json"), ("runs/nowhere", "no folder here, and the Hub")):
        message = failure(run("generate", "a", "--model", name, "--output", tmp_path / "a.png"))
        assert f"--model {name}" in message and words in message and "recipes/pretrain.py" in message


def test_retrieval_that_cannot_be_is_refused(
    checkpoint: str, code_checkpoint: str, memory_dir: str, tmp_path: Path
) -> None:
    def fail(model: str, *options: object) -> str:
        return failure(run("generate", "a", "--model", model, "--output", tmp_path / "a.png", *options))

    missing, folder = tmp_path / "missing", ["--retrieval-dir", memory_dir]
    assert "a TransfusionPipeline does not retrieve" in fail(checkpoint, *folder)
    assert "a TransfusionPipeline does not retrieve" in fail(checkpoint, "--num-retrieved", 0)
    assert f"--retrieval-dir {missing} is no folder" in fail("not/loaded", "--retrieval-dir", missing)
    assert "--num-retrieved 2 needs --retrieval-dir" in fail("not/loaded", "--num-retrieved", 2)
    assert "it has no source.json" in fail(code_checkpoint, "--retrieval-dir", tmp_path)
    assert "retrieved documents takes" in fail(code_checkpoint, *folder, "--num-retrieved", 9)
    assert not list(tmp_path.iterdir())


def test_without_a_seed_the_seed_drawn_is_told(checkpoint: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    seeds = []
    for path in paths:
        result = run("generate", "a red star", "--model", checkpoint, "--output", path, "--json")
        seeds.append(json.loads(result.stdout)["seed"])
    assert seeds[0] != seeds[1] and paths[0].read_bytes() != paths[1].read_bytes()
    run("generate", "a red star", "--model", checkpoint, "--output", tmp_path / "again.png", "--seed", seeds[0])
    assert (tmp_path / "again.png").read_bytes() == paths[0].read_bytes()


@pytest.mark.parametrize("name", ["star.xyz", "star", "."])
def test_an_ending_that_is_no_picture_is_refused_before_loading(tmp_path: Path, name: str) -> None:
    result = run("generate", "a red star", "--model", "not/loaded", "--output", tmp_path / name)
    assert result.exit_code == 2
    assert "must end in one of .png, .jpg" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["generate"], "PROMPT"),
        (["generate", "a", "--num-images", 0], "--num-images"),
        (["generate", "a", "--guidance-scale", 0.5], "--guidance-scale"),
        (["generate", "a", "--colour", "red"], "--colour"),
        (["caption"], "IMAGE"),
        (["caption", "a.png", "--max-new-tokens", 0], "--max-new-tokens"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_argument(options: list, words: str) -> None:
    result = run(*options)
    assert result.exit_code == 2 and words in result.stderr


def test_a_size_off_the_grid_is_refused_with_the_nearest(checkpoint: str, tmp_path: Path) -> None:
    result = run("generate", "a", "--model", checkpoint, "--output", tmp_path / "a.png", "--height", 5)
    assert "`height`=5 must be a multiple of 2 pixels. Try 4." in failure(result)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_spells_a_special_token_is_refused(checkpoint: str, tmp_path: Path) -> None:
    result = run("generate", "a <boi> star", "--model", checkpoint, "--output", tmp_path / "a.png")
    assert "special token '<boi>'" in failure(result)


@pytest.mark.parametrize("command", ["generate", "caption"])
def test_a_missing_model_is_named(tmp_path: Path, command: str) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (7, 5)).save(picture)
    missing = tmp_path / "no-model"
    assert str(missing) in failure(run(command, picture, "--model", missing))


def test_pictures_are_captioned_in_order(checkpoint: str, tmp_path: Path) -> None:
    images = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for number, image in enumerate(images):
        Image.new("RGB", (7 + number, 5), (200 * number, 30, 60)).save(image)
    result = run("caption", *images, "--model", checkpoint, "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    captions = [json.loads(line) for line in result.stdout.splitlines()]
    assert [caption["image"] for caption in captions] == [str(image) for image in images]
    plain = run("caption", images[0], "--model", checkpoint, "--max-new-tokens", 4)
    assert plain.stdout == f"{images[0]}: {captions[0]['caption']}\n"
    longer = run("caption", images[0], "--model", checkpoint, "--max-new-tokens", 9, "--prompt", "a red")
    assert longer.stdout != plain.stdout


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_bad_image_is_named_before_loading(tmp_path: Path, content: bytes | None) -> None:
    image = tmp_path / "bad.png"
    if content is not None:
        image.write_bytes(content)
    assert f"`{image}` is" in failure(run("caption", image, "--model", "not/loaded"))


def test_a_pipeline_that_does_not_caption_is_refused(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    image = tmp_path / "a.png"
    Image.new("RGB", (7, 5)).save(image)
    message = failure(run("caption", image, "--model", tmp_path / "ddpm"))
    assert "DDPMPipeline, which does not describe pictures" in message
    message = failure(run("edit", image, "a", "--model", tmp_path / "ddpm"))
    assert "DDPMPipeline, which does not edit pictures" in message
    message = failure(run("chat", "--model", tmp_path / "ddpm", lines="a\n"))
    assert "DDPMPipeline, which does not hold conversations" in message


@pytest.mark.parametrize("command", ["generate", "caption", "edit", "chat"])
def test_help_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.count(f"  hf-mm {command} ") == {"generate": 4, "caption": 3, "edit": 3, "chat": 2}[command]


@pytest.mark.slow
def test_the_installed_command_draws_without_chatter(checkpoint: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("hf-mm")), "generate", "a red star", "--model", checkpoint]
    result = subprocess.run(
        [*command, "--output", "star.png", "--seed", "5"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "star.png (seed 5)\n" and (tmp_path / "star.png").exists()
