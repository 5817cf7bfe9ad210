import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

import export_checkpoint
import hf_mm  # noqa: F401
from hf_mm.training.checkpoint import _read_manifest, _seal, list_checkpoints


def export(checkpoint, folder):
    return export_checkpoint.main(["--checkpoint", str(checkpoint), "--output_dir", str(folder)])


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_the_last_checkpoint_gives_the_model_that_the_run_gave(run, tmp_path, ema_decay):
    folder = run("run", max_steps=3, save_steps=2, save_total_limit="none", ema_decay=ema_decay)
    first, last = list_checkpoints(folder)
    assert (first.name, last.name) == ("checkpoint-2", "checkpoint-3")
    wanted, given, earlier = (
        AutoModelForMultimodalLM.from_pretrained(path).state_dict()
        for path in (folder, export(last, tmp_path / "last"), export(first, tmp_path / "first"))
    )
    assert wanted.keys() == given.keys() == earlier.keys()
    assert all(torch.equal(given[name], weight) for name, weight in wanted.items())
    assert not all(torch.equal(earlier[name], weight) for name, weight in wanted.items())
    tokenizers = [AutoProcessor.from_pretrained(path).tokenizer for path in (folder, tmp_path / "first")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    card = (tmp_path / "first" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "step 2 of a run" in card and ("moving average" in card) is (ema_decay is not None)


def test_what_is_no_checkpoint_of_a_model_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        export(tmp_path, tmp_path / "out")
    checkpoint = list_checkpoints(run("run", max_steps=1))[-1]
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(checkpoint, checkpoint)
    manifest = _read_manifest(checkpoint)
    manifest["identity"]["lora_rank"] = 8
    _seal(checkpoint, manifest)
    with pytest.raises(ValueError, match="holds adapters of rank 8"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
