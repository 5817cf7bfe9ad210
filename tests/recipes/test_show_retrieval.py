import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from PIL import Image

import build_retrieval_index
import show_retrieval
from hf_mm.cm3leon import CM3LeonPipeline
from hf_mm.data.retrieval import Retriever, as_document
from hf_mm.data.retrieval_source import open_retriever


disable_progress_bars()
TEXTS = ["kite", "a red star", "blue <boxes> & more", "moon", "orange", "green", "white", "left", "two", "an orange"]
PROMPTS = ["a star <b>", "two"]


@pytest.fixture
def memory_dir(clip_dir: Path, tmp_path: Path) -> Path:
    rows = {"image": [Image.new("RGB", (9, 7), (25 * row, 200, 90)) for row in range(10)], "text": TEXTS}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    words = ["--dataset_name", tmp_path / "rows", "--clip_name", clip_dir, "--output_dir", tmp_path / "index"]
    words += ["--num_shards", 2, "--max_relevance", 1, "--max_similarity", 1]
    return build_retrieval_index.main([str(word) for word in words])


@pytest.fixture
def pipe(make_cm3leon, make_cm3leon_processor) -> CM3LeonPipeline:
    model = make_cm3leon()
    pipe = CM3LeonPipeline(model, make_cm3leon_processor(model.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def show(pipe: CM3LeonPipeline, memory_dir: Path, folder: Path, *more: object) -> str:
    pipe.save_pretrained(folder / "model")
    words = ["--model_name_or_path", folder / "model", "--retrieval_dir", memory_dir, "--prompts", *PROMPTS]
    return show_retrieval.main([str(word) for word in [*words, "--output", folder / "new" / "page.html", *more]])


def read_figures(section: str) -> list[tuple[str, np.ndarray, str]]:
    found = re.findall(
        r'<figure class="(\w+)"><img alt="" src="data:image/png;base64,(.*?)"><figcaption>(.*?)</', section
    )
    return [(kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), text) for kind, data, text in found]


def test_the_page_holds_what_was_drawn_and_what_was_retrieved_with_scores(pipe, memory_dir, tmp_path):
    path = show(pipe, memory_dir, tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    sections = path.read_text(encoding="utf-8").split("<section>")[1:]
    assert len(sections) == 2 and "<h2>a star &lt;b&gt;</h2>" in sections[0]
    found = open_retriever(memory_dir).retrieve(PROMPTS, num_retrieved=2)
    for number, section in enumerate(sections):
        figures = read_figures(section)
        assert [kind for kind, _, _ in figures] == ["drawn"] * 3 + ["retrieved"] * 2
        drawn = [pixels for kind, pixels, _ in figures if kind == "drawn"]
        assert not np.array_equal(drawn[0], drawn[1])
        for rank, (_, pixels, caption) in enumerate(figures[3:]):
            row, score = found.ids[number][rank], found.scores[number][rank]
            escaped = TEXTS[row].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            assert caption == f"{rank + 1}. score {score:.3f}, row {row}: {escaped}"
            assert (pixels == (25 * row, 200, 90)).all()


def test_a_picture_without_retrieval_is_that_of_the_pipeline(pipe, memory_dir, tmp_path):
    page = show(pipe, memory_dir, tmp_path, "--nums_retrieved", 0).read_text(encoding="utf-8")
    figures = [figure for section in page.split("<section>")[1:] for figure in read_figures(section)]
    generators = [show_retrieval.torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipe(PROMPTS, generator=generators).images
    assert [kind for kind, _, _ in figures] == ["drawn"] * 2
    assert all(np.array_equal(shown, image) for (_, shown, _), image in zip(figures, expected, strict=True))


def test_the_pipeline_takes_a_retriever_as_it_is(pipe, memory_dir):
    retriever = open_retriever(memory_dir)
    draw = lambda **kwargs: pipe(PROMPTS, output_type="codes", do_sample=False, **kwargs).images  # noqa: E731
    by_hand = retriever.retrieve(PROMPTS, num_retrieved=1).documents
    (first,), (second,) = retriever.retrieve([PROMPTS[0]] * 2, num_retrieved=1).documents
    assert first is second  # so that its picture is read once
    assert (draw(retriever=retriever, num_retrieved=1) == draw(retrieved=by_hand)).all()
    assert (draw(retriever=retriever) != draw(retrieved=by_hand)).any()


def test_a_retriever_opened_from_its_folder_has_the_rules_and_rows_that_it_was_built_with(memory_dir, tmp_path):
    retriever = open_retriever(memory_dir)
    assert isinstance(retriever, Retriever) and retriever.strategy.max_relevance == 1
    assert retriever.memory["text"] == TEXTS
    note = json.loads((memory_dir / "source.json").read_text(encoding="utf-8"))
    Dataset.from_dict({"image": [Image.new("RGB", (9, 7))] * 10, "text": TEXTS}).save_to_disk(tmp_path / "others")
    note["dataset"]["dataset_name"] = str(tmp_path / "others")
    (memory_dir / "source.json").write_text(json.dumps(note), encoding="utf-8")
    with pytest.raises(ValueError, match="are of other rows than these"):
        open_retriever(memory_dir)
    (memory_dir / "source.json").unlink()
    with pytest.raises(ValueError, match="it has no source.json"):
        open_retriever(memory_dir)


def test_rows_become_documents_with_a_text_and_a_picture_or_codes():
    picture = Image.new("RGB", (3, 2), "red")
    assert as_document({"text": "kite", "image": picture})["image"].size == (3, 2)
    assert as_document({"text": "kite", "codes": [1], "image": picture}) == {"text": "kite", "codes": [1]}
    assert as_document({"text": "kite", "image": None}) == {"text": "kite"}
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": picture}, {"type": "text", "text": "b"}]
    assert as_document({"content": content})["text"] == "a b"
    with pytest.raises(ValueError, match=r"has pictures as \['pixels'\]"):
        as_document({"text": "kite", "pixels": [[1]]})


def test_numbers_below_0_are_refused():
    with pytest.raises(ValueError, match=r"`nums_retrieved`=\[-1\]"):
        show_retrieval.main(["--model_name_or_path", "a", "--retrieval_dir", "b", "--nums_retrieved", "-1"])
