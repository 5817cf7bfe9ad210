"""Instruction tuning as a user runs it, with models of a few thousand weights: both families, adapters, resume."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

import export_checkpoint
import sft
from adapting import AdapterArguments, add_adapters
from hf_mm.cards import rename
from hf_mm.data import collators
from hf_mm.data.tasks import SOURCES as SOURCES_OF_PAPER
from hf_mm.data.tasks import TASKS
from hf_mm.training.checkpoint import list_checkpoints
from hf_mm.training.optimization import hold_rows
from hf_mm.training.recipe import parse_recipe
from task_sources import CHAT


SOURCES = ["edit@icon_scenes:shapes", "vqa@icon_scenes:shapes"]


@pytest.fixture
def tune(tmp_path: Path):
    """Tunes in this process; returns the run's folder."""

    def run(base: Path, folder: str = "tuned", **fields: object) -> Path:
        fields = {
            "model_name_or_path": base,
            "sources": SOURCES,
            "num_task_scenes": 40,
            "num_scenes": 20,
            "num_eval_rows": 3,
            "num_samples": 2,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "mixed_precision": "no",
            "report_to": "none",
            "output_dir": tmp_path / folder,
            **fields,
        }
        words = []
        for name, value in fields.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return sft.main(words)

    return run


@pytest.fixture
def transfusion(run) -> Path:
    return run("base", max_steps=1)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_tuning_leaves_a_model_its_scores_and_pictures_of_its_tasks(transfusion, tune, entries):
    template = "Edit first image following the instruction<image>{prompt}"
    folder = tune(transfusion, eval_steps=2, num_eval_rows=8, num_task_scenes=80, edit_template=template)
    table = (folder / "tasks.md").read_text()
    assert "step 0" in table and "step 2" in table
    for source, rate in ((SOURCES[0], "edit_success"), (SOURCES[1], "answer_accuracy")):
        assert f"| {source} | {rate} |" in table
    pictures = {path.name for path in (folder / "tasks").glob("*.png")}
    assert {"gallery-000000.png", "gallery-000002.png"} <= pictures and len(pictures) == 6
    assert entries(folder)[2]["num_images_seen"] > 0
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.processor.edit_template.startswith("Edit first image")
    assert pipe("make it blue", image=Image.new("RGB", (16, 16))).images[0].size == (16, 16)
    before, after = weights_of(transfusion), weights_of(folder)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_rows_are_answered_on_the_way_without_compiling(transfusion, tune, monkeypatch):
    """Graphs of prompts would count towards dynamo's limit, beyond which training runs uncompiled."""
    graphs, compile_model, report = [], torch.nn.Module.compile, sft.TaskReport.report

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def watch(tasks, step):
        before = len(graphs)
        report(tasks, step)
        assert len(graphs) == before

    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend=note))
    monkeypatch.setattr(sft.TaskReport, "report", watch)
    folder = tune(transfusion, eval_steps=1, num_samples=1, torch_compile=True)
    assert graphs and "step 2" in (folder / "tasks.md").read_text()


def test_a_checkpoint_of_a_tuning_is_exported_with_its_template(transfusion, tune, tmp_path):
    folder = tune(transfusion, edit_template="{prompt}<image>", reports_start=False, num_samples=1)
    words = ["--checkpoint", str(folder / "checkpoint-2"), "--output_dir", str(tmp_path / "exported")]
    templates = [
        AutoProcessor.from_pretrained(place).edit_template for place in (folder, export_checkpoint.main(words))
    ]
    assert templates == ["{prompt}<image>"] * 2


@pytest.mark.parametrize("family", ["transfusion", "cm3leon"])
def test_documents_in_packed_windows_teach_what_they_teach_alone(family, run, codes, tune, entries, monkeypatch):
    packings = []
    pack = collators.pack_windows
    monkeypatch.setattr(collators, "pack_windows", lambda *given: packings.append(pack(*given)) or packings[-1])
    of_base, spans = ({}, {}) if family == "transfusion" else (codes, {"max_spans": 1})
    base = run("base", max_steps=1, **of_base)
    fields = spans | {"reports_start": False, "num_samples": 1, "max_steps": 3, "rehearsal_share": 0.0}
    alone, packed = (
        [
            [entry[name] for name in ("loss", "grad_norm", "num_items_seen")]
            for entry in entries(tune(base, f"window_{length}", window_length=length, **fields)).values()
        ]
        for length in ("none", 300)
    )
    assert len(alone) == 3 and torch.allclose(torch.tensor(packed), torch.tensor(alone), rtol=2e-3)
    assert len(packings) >= 3 and all(len(windows) < 4 for windows in packings)


def test_shares_are_those_asked_for_where_they_are_not_clipped(transfusion, tune):
    shares = {"source_shares": [0.05, 0.95], "rehearsal_share": 0.0, "reports_start": False, "num_samples": 1}
    for is_clipped, told in ((True, ("15.0%", "85.0%")), (False, ("5.0%", "95.0%"))):
        folder = tune(transfusion, f"clipped_{is_clipped}", clips_shares=is_clipped, max_steps=1, **shares)
        assert all(f"| 40 | {share} |" in (folder / "README.md").read_text() for share in told)


def test_models_of_codes_are_tuned_on_codes_of_their_own_tokenizer(run, codes, tune):
    base = run("base", max_steps=1, **codes)
    folder = tune(base, eval_steps=5, reports_start=False, answer_masking_share=0.8, max_spans=1)  # of 2 steps
    manifest = json.loads((folder / "encoded" / "00-edit" / "manifest.json").read_text())
    assert list(manifest["columns"]) == ["codes"] and manifest["num_rows"] == 80
    assert "step 2" in (folder / "tasks.md").read_text()
    assert DiffusionPipeline.from_pretrained(folder).caption([Image.new("RGB", (16, 16))], prompt="what?")


@pytest.mark.parametrize("is_encoded", [False, True], ids=["pictures", "latents"])
def test_models_of_latents_are_tuned_on_what_their_own_vae_encodes(is_encoded, run, latents, tune, encode, entries):
    base = run("base", max_steps=1, **latents)
    rehearsed = {"dataset_name": latents["dataset_name"]} if is_encoded else {}
    folder = tune(base, eval_steps=2, reports_start=False, rehearsal_share=0.5, **rehearsed)
    manifest = json.loads((folder / "encoded" / "00-edit" / "manifest.json").read_text())
    assert list(manifest["columns"]) == ["latent_mean", "latent_std"]
    assert (folder / "encoded" / "rehearsal").exists() != is_encoded
    assert "step 2" in (folder / "tasks.md").read_text() and entries(folder)[2]["num_images_seen"] > 0
    before, after = weights_of(base), weights_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model.vae."))
    assert any(name.startswith("model.vae.") for name in before)
    assert DiffusionPipeline.from_pretrained(folder)("make it blue", image=Image.new("RGB", (16, 16))).images


def test_rehearsed_latents_of_another_vae_are_refused(run, latents, tune, encode):
    base = run("base", max_steps=1, **latents)
    vae = AutoencoderKL.from_pretrained(latents["image_tokenizer_name"])
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    vae.save_pretrained(latents["image_tokenizer_name"])
    others = encode("others", latents["image_tokenizer_name"])
    with pytest.raises(ValueError, match="was encoded with another image tokenizer than the model's"):
        tune(base, dataset_name=others)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(transfusion, tune, entries):
    whole = entries(tune(transfusion, "whole", max_steps=4, save_steps=2))
    folder = tune(transfusion, "cut", max_steps=4, save_steps=2)
    last = list_checkpoints(folder)[-1]
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = entries(tune(transfusion, "cut", max_steps=4, save_steps=2))
    assert again[4] == whole[4]


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"lora_modules_to_save": ["norm", "patch_in.projection"]}],
    ids=["lora", "dora", "norms too"],
)
def test_adapters_alone_on_their_base_are_the_merged_model(fields, transfusion, tune):
    folder = tune(transfusion, lora_rank=2, eval_steps=3, **fields)
    rename(folder / "adapter", {str(transfusion): "me/base"})  # as publishing does
    card = (folder / "adapter" / "README.md").read_text()
    assert 'from_pretrained("me/base"' in card and str(transfusion.parent) not in card
    merged = AutoModelForMultimodalLM.from_pretrained(folder)
    assert not any("lora" in name for name in merged.state_dict())
    adapted = AutoModelForMultimodalLM.from_pretrained(transfusion)
    base = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    adapted = PeftModel.from_pretrained(adapted, folder / "adapter")
    ids = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
        plain = AutoModelForMultimodalLM.from_pretrained(transfusion)(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-4
    kept = [name for name, weight in merged.state_dict().items() if torch.equal(weight, base[name])]
    assert any("embed_tokens" in name for name in kept)  # what has no adapter stays as it was
    is_tuned = "lora_modules_to_save" in fields
    assert all((name in kept) != is_tuned for name in base if "norm" in name or "patch_in.projection" in name)


def test_adapters_reach_every_projection_of_a_model_of_codes(make_cm3leon):
    """Those too that write to the residual stream, which are linear layers of a class of their own."""
    model = make_cm3leon()
    add_adapters(model, AdapterArguments(lora_rank=2))
    layer = model.model.layers[0]
    parts = [*layer.self_attn.children(), *(part for part in layer.mlp.children() if hasattr(part, "weight"))]
    assert len(parts) == 6 and all("default" in part.lora_A for part in parts)


def test_parts_that_are_tuned_whole_are_none_of_the_image_tokenizer(run, latents, tune):
    base = run("base", max_steps=1, **latents)
    folder = tune(
        base, dataset_name=latents["dataset_name"], lora_rank=2, lora_modules_to_save=["norm"], ema_decay=0.9
    )
    before, after = weights_of(base), weights_of(folder)
    norms = [name for name in before if "norm" in name]
    assert any(name.startswith("model.vae.") and ".group_norm." in name for name in norms)
    for name in norms:
        assert torch.equal(before[name], after[name]) == name.startswith("model.vae.")


@pytest.mark.parametrize("kind", ["pixels", "documents"])
def test_rehearsed_pictures_that_no_vae_encoded_are_refused(kind, run, latents, tune, encode, tmp_path):
    base = run("base", max_steps=1, **latents)
    if kind == "pixels":
        rows = encode("pixels", None)
    else:
        parts = [
            {"type": "text", "text": "a red star", "image": None},
            {"type": "image", "text": None, "image": Image.new("RGB", (16, 16))},
        ]
        rows = tmp_path / "documents"
        Dataset.from_dict({"content": [parts] * 12}).save_to_disk(rows)
    with pytest.raises(ValueError, match="holds pixels, and the model reads latents of its VAE"):
        tune(base, dataset_name=rows)
    assert not (tmp_path / "tuned" / "encoded").exists()


def test_own_edits_and_conversations_are_tuned_on(transfusion, tune, tmp_path):
    red, blue = (Image.new("RGB", (20, 16), color) for color in ("red", "blue"))
    edits = {"input_image": [red] * 12, "instruction": ["make it blue"] * 12, "image": [blue] * 12}
    Dataset.from_dict(edits).save_to_disk(tmp_path / "edits")
    part = [{"type": "text", "text": "hi", "image": None}]
    answer = [{"type": "image", "text": None, "image": red}]
    messages = [{"role": "user", "content": part}, {"role": "assistant", "content": answer}]
    rows = Dataset.from_dict({"messages": [messages] * 12})
    rows.save_to_disk(tmp_path / "chats")
    sources = [f"edit@{tmp_path / 'edits'}", f"chat@{tmp_path / 'chats'}"]
    folder = tune(transfusion, sources=sources, rehearsal_share=0.0, train_on_inputs=False, eval_steps=2)
    assert (folder / "model.safetensors").exists() and len(list((folder / "tasks").glob("*.png"))) == 4


def test_conversations_about_scenes_are_tuned_on_and_scored(transfusion, tune):
    folder = tune(transfusion, sources=["chat@icon_scenes:shapes"], eval_steps=2)
    table = (folder / "tasks.md").read_text()
    assert "| chat@icon_scenes:shapes | edit_success | 0.0% | 0.0% |" in table
    assert {path.name for path in (folder / "tasks").glob("*.png")} >= {"chat-icon_scenes-shapes-000002.png"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ["edit@icon_scenes:shapes"] * 2}, "an entry twice"),
        ({"sources": ["juggle@icon_scenes:shapes"]}, "names the task 'juggle'"),
        ({"sources": ["nothing_known"]}, "'nothing_known' is unknown"),
        ({"source_shares": [1.0]}, "`source_shares` has 1 entries and `sources` 2"),
        ({"rehearsal_share": 1.0}, "`rehearsal_share`=1.0"),
        ({"use_dora": True}, "`use_dora`=True needs a `lora_rank` above 0"),
        ({"lora_modules_to_save": ["norm"]}, "`lora_modules_to_save`=.* needs a `lora_rank` above 0"),
        ({"lora_dropout": 0.1}, "`lora_dropout`=0.1 needs a `lora_rank` above 0"),
        ({"answer_masking_share": 0.8}, "`answer_masking_share`=0.8, but the model has `objective`=None"),
        ({"whole_segment_share": 0.2}, "`whole_segment_share`=0.2, but the model has `objective`=None"),
        ({"window_length": 10}, "no row of 'edit@.*' fits into the 10 positions of a window .`window_length`"),
        ({"lora_rank": 2, "lora_modules_to_save": ["nowhere"]}, "no part .* ends in 'nowhere'"),
        ({"lora_rank": 2, "lora_target_modules": ["nowhere"]}, "nowhere"),
        ({"trains_code_embeddings": False}, "is for models that read codes"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(fields, message, transfusion, tune, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(transfusion, report_to="tensorboard", **fields)
    assert not list(tmp_path.rglob("logs"))


def test_held_rows_are_not_copied_into_adapters():
    model = torch.nn.ModuleDict({"norm": torch.nn.Linear(3, 3)})
    hold_rows(model["norm"].weight, slice(0, 1))
    with pytest.raises(ValueError, match="`lora_modules_to_save`=.'norm'. trains copies"):
        add_adapters(model, AdapterArguments(lora_rank=2, lora_modules_to_save=["norm"]))


def test_an_edit_whose_pictures_differ_in_size_is_refused_with_its_row(transfusion, tune, tmp_path):
    sizes = [(16, 16), (16, 16), (24, 16)]
    rows = {
        "input_image": [Image.new("RGB", (16, 16))] * 3,
        "instruction": ["x"] * 3,
        "image": [Image.new("RGB", size) for size in sizes],
    }
    Dataset.from_dict(rows).save_to_disk(tmp_path / "edits")
    with pytest.raises(ValueError, match="Row 2"):
        tune(transfusion, sources=[f"edit@{tmp_path / 'edits'}"])


# CM3Leon (arXiv 2309.02591), appendix E: GPUs; 30B tokens in steps of 2M.
@pytest.mark.parametrize(("size", "num_gpus"), [("760m", 64), ("7b", 128)])
def test_numbers_of_the_paper_stand_in_the_recipe_of_each_size(size, num_gpus):
    path = Path(__file__).parents[2] / "recipes" / "configs" / f"cm3leon_{size}_sft.yaml"
    parsed = parse_recipe(*sft.ARGUMENTS, argv=["--config", str(path)])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert (values["learning_rate"], values["warmup_steps"], values["max_steps"]) == (5e-5, 150, 15_000)
    rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * num_gpus
    assert rows * 1_570 == pytest.approx(2e6, rel=0.02)  # 1,040 tokens of one picture, 2,100 of two, as many of each
    assert set(values["sources"]) < set(SOURCES_OF_PAPER) and values["clips_shares"] and values["train_on_inputs"]
    assert f"on {num_gpus} GPUs" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("family", ["transfusion", "cm3leon"])
def test_the_small_recipes_name_what_there_is(family):
    path = Path(__file__).parents[2] / "recipes" / "configs" / f"{family}_tiny_sft.yaml"
    parsed = parse_recipe(*sft.ARGUMENTS, argv=["--config", str(path)])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert all(source.split("@")[0] in {*TASKS, CHAT} for source in values["sources"])
    assert sum(values["source_shares"]) == pytest.approx(1)
    trained = [yaml.safe_load(other.read_text())["output_dir"] for other in path.parent.glob(f"{family}_tiny_*.yaml")]
    assert values["model_name_or_path"] in trained
