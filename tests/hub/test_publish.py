"""Publishing: one commit that is complete, sent again only where it was not there, or one line that says why not."""

import json

import huggingface_hub.constants
import pytest
import torch
from hub_server import TOKEN, File, Repo
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from hf_mm.hub import export_folder, publish, save_parts, stage_folder


NAME = "me/model"


@pytest.fixture
def folder(make_folder, not_checked):
    return make_folder("transfusion")


@pytest.fixture
def download(tmp_path):
    def load(number=[0], **places):  # noqa: B006, counts its calls
        number[0] += 1
        return snapshot_download(NAME, cache_dir=tmp_path / f"cache-{number[0]}", **places)

    return load


def assert_equal_weights(folder, expected):
    weights, wanted = (AutoModelForMultimodalLM.from_pretrained(place).state_dict() for place in (folder, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights.items())


def refused(kind, words, *arguments, **options):
    """Publishes, expecting an error of one line."""
    with pytest.raises(kind, match=words) as caught:
        publish(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_published_comes_back_alike_and_is_one_commit(hub, folder, download):
    (folder / "README.md").write_text('---\nlicense: mit\n---\n\npipeline(model=".")\n')
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    address = publish(folder, NAME)
    assert address == f"{hub.url}/{NAME}/commit/{hub.repos[NAME].branches['main']}"
    assert len(hub.repos[NAME].commits) == 2  # the Hub's first, and one with everything
    assert_equal_weights(download(), folder)
    assert b'pipeline(model="me/model")' in hub.files(NAME)["README.md"]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publishing_the_same_again_sends_no_weights_and_makes_no_commit(hub, folder):
    publish(folder, NAME)
    hub.requests.clear()
    publish(folder, NAME)
    assert not hub.uploads() and len(hub.repos[NAME].commits) == 2


def test_a_private_repo_is_private_and_a_revision_is_a_branch(hub, folder, download):
    publish(folder, NAME, private=True, revision="v1")
    assert hub.repos[NAME].private
    assert set(hub.files(NAME, "main")) == {".gitattributes"}
    assert_equal_weights(download(revision="v1"), folder)


def test_large_weights_are_split_and_no_file_of_another_splitting_stays(hub, folder, download):
    publish(folder, NAME, max_shard_size="60KB")
    files = hub.files(NAME)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors" not in files
    assert max(len(files[name]) for name in shards) < 70_000
    assert_equal_weights(download(), folder)
    publish(folder, NAME)
    names = {name for name in hub.files(NAME) if "safetensors" in name}
    assert names == {"model.safetensors"}
    assert_equal_weights(download(), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_for_the_download_and_computed_with_as_before(hub, folder, download, dtype):
    publish(folder, NAME, weights_dtype=str(dtype).removeprefix("torch."))
    place = download()
    assert {weight.dtype for weight in load_file(f"{place}/model.safetensors").values()} == {dtype}
    model, before = (AutoModelForMultimodalLM.from_pretrained(place) for place in (place, folder))
    assert model.dtype == before.dtype == torch.float32
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(dtype).float())


def test_weights_that_cannot_be_rounded_are_refused(hub, folder):
    refused(ValueError, "`weights_dtype`='int8' must be one of", folder, NAME, weights_dtype="int8")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: torch.full_like(weights[name], 1e6)}, folder / "model.safetensors", {"format": "pt"})
    refused(ValueError, f"cannot hold .*{name}", folder, NAME, weights_dtype="float16")


def test_a_file_that_the_hub_wants_in_parts_arrives_whole(hub, folder, download):
    hub.part_bytes = 50_000
    publish(folder, NAME)
    assert len(hub.uploads()) > 2
    assert_equal_weights(download(), folder)


def test_after_a_cut_there_is_nothing_and_the_same_call_sends_only_what_is_missing(hub, folder, download):
    hub.cuts_uploads_from = 2
    refused(ConnectionError, "goes on where", folder, NAME, max_shard_size="60KB")
    assert set(hub.files(NAME)) == {".gitattributes"}
    sent = {f"/large/{sha256}" for sha256 in hub.large}
    assert len(sent) == 2

    hub.cuts_uploads_from = None
    hub.requests.clear()
    publish(folder, NAME, max_shard_size="60KB")
    assert hub.uploads() and not sent & set(hub.uploads())
    assert len(hub.repos[NAME].commits) == 2
    assert_equal_weights(download(), folder)


def test_a_hub_in_trouble_is_said_in_one_line_and_the_same_call_goes_on(hub, folder):
    hub.refused = {"/commit/": 503}
    refused(ConnectionError, "status 503", folder, NAME)
    hub.refused = {"/commit/": 412}
    refused(OSError, "Somebody else wrote", folder, NAME)
    hub.refused, hub.requests[:] = {}, []
    publish(folder, NAME)
    assert not hub.uploads()


def test_a_repo_with_something_else_is_refused_unless_asked_for(hub, folder):
    repo = hub.repos["me/other"] = Repo("me/other", private=False)
    repo.commit("main", "other", {"data.csv": File(b"1,2", 3)})
    commits = dict(repo.commits)
    refused(ValueError, "me/other exists and holds something else", folder, "me/other")
    refused(ValueError, "exists and is public", folder, "me/other", private=True, overwrite=True)
    assert repo.commits == commits
    publish(folder, "me/other", overwrite=True)
    assert {"data.csv", "model.safetensors"} <= hub.files("me/other").keys()


def test_pickled_weights_are_refused_before_the_hub_is_asked(hub, folder):
    torch.save({}, folder / "pytorch_model.bin")
    told = refused(ValueError, "pytorch_model.bin", folder, NAME)
    assert "safetensors.torch.save_file" in told
    assert not hub.requests


def test_a_missing_or_wrong_token_is_said_in_one_line(hub, folder, monkeypatch):
    refused(PermissionError, "hf auth login", folder, NAME, token="hf_wrong")
    refused(PermissionError, "may not write to you/model", folder, "you/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    refused(PermissionError, "hf auth login", folder, NAME)
    assert not hub.repos
    publish(folder, NAME, token=TOKEN)


def test_no_network_is_said_in_one_line(hub, folder, monkeypatch):
    hub.__exit__()
    refused(ConnectionError, "is not reached", folder, NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(ConnectionError, "unset HF_HUB_OFFLINE", folder, NAME)


def test_a_card_that_the_hub_does_not_take_is_said_in_one_line_before_weights_are_sent(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [mit]\n---\n")
    refused(ValueError, 'Invalid metadata in README.md. - "license" must be a string', folder, NAME)
    assert not hub.uploads()


def test_a_loss_of_the_library_that_sends_chunks_is_said_in_one_line(hub, folder, monkeypatch):
    def lose(*arguments, **options):
        raise RuntimeError("Data processing error:\n connection reset")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", lose)
    refused(ConnectionError, "was lost .Data processing error: connection reset", folder, NAME)


def test_what_does_not_load_without_hf_mm_is_not_published(hub, make_folder, monkeypatch):
    def fail(folder):
        raise RuntimeError("does not load")

    monkeypatch.setattr("hf_mm.hub.check_cold_load", fail)
    refused(RuntimeError, "does not load", make_folder("transfusion"), NAME)
    assert not hub.repos


def test_checkpoints_and_logs_stay_at_home(folder, tmp_path):
    for name in (
        "checkpoint-2/model.safetensors",
        "logs/events",
        "encoded/a.arrow",
        "x.tmp",
        "pushed.tmp/a",
        ".git/b",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    stage_folder(folder, tmp_path / "staged")
    staged = {path.relative_to(tmp_path / "staged").parts[0] for path in (tmp_path / "staged").rglob("*")}
    assert not staged & {"checkpoint-2", "logs", "encoded", "x.tmp", "pushed.tmp", ".git"}
    assert {"model.safetensors", "config.json", "scheduler", "modeling_transfusion.py"} <= staged


def test_a_repo_without_code_for_diffusers_asks_for_no_trust_there(hub, folder):
    publish(folder, NAME)
    assert isinstance(json.loads(hub.files(NAME)["model_index.json"])["_class_name"], list)
    publish(folder, NAME, self_contained=False)
    assert json.loads(hub.files(NAME)["model_index.json"])["_class_name"] == "TransfusionPipeline"
    assert "model/from_root.py" not in hub.files(NAME)


def test_a_pipeline_is_published_with_a_card_and_so_known_when_published_again(hub, make_pipeline, not_checked):
    pipe = make_pipeline("cm3leon")
    publish(pipe, NAME)
    publish(pipe, NAME, commit_message="Same")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.library_name == "hf_mm" and card.data.pipeline_tag == "text-to-image"


def test_adapters_are_published_alone_with_the_model_they_belong_on(hub, make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    refused(ValueError, "which is no Hub id", tmp_path / "adapter", NAME)
    publish(tmp_path / "adapter", NAME, base_model="me/base")
    publish(tmp_path / "adapter", NAME, base_model="me/base")
    files = hub.files(NAME)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.library_name == "peft"
    assert "More Information Needed" not in card.text
    assert "model.safetensors" not in files and str(tmp_path).encode() not in b"".join(files.values())


def test_a_folder_without_a_model_is_refused(hub, folder, tmp_path):
    refused(ValueError, "is no folder", tmp_path / "missing", NAME)
    (tmp_path / "empty").mkdir()
    refused(ValueError, "holds no model", tmp_path / "empty", NAME)
    refused(ValueError, "is for adapters", folder, NAME, base_model="me/base")
    assert not hub.repos


def test_saving_again_leaves_no_weights_of_before(make_pipeline, tmp_path):
    pipe = make_pipeline("transfusion")
    for size in ("5GB", "60KB", "5GB"):
        save_parts(pipe, tmp_path, size)
        names = {path.name for path in tmp_path.glob("model*.safetensors")}
        assert ("model.safetensors" in names) == (size == "5GB") and (len(names) == 1) == (size == "5GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_an_exported_folder_is_known_by_its_card(make_pipeline, tmp_path):
    template = tmp_path / "card.md"
    template.write_text("---\n{{ card_data }}\n---\n\n# {{ title }}\n")
    folder = export_folder(
        make_pipeline("transfusion"),
        tmp_path / "out",
        card_template=template,
        card_data={"license": "mit"},
        card_values={"title": "Shapes"},
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "hf_mm" and "# Shapes" in card.text
