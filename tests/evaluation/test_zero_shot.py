"""The harness scores our models as they are, and as it scores the Llama they were made of."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_mm.evaluation.zero_shot import zero_shot_accuracy
from hf_mm.transfusion import TransfusionForConditionalGeneration


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and what it imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def task_dir(tmp_path):
    """A task of 23 questions about scenes, of two answers each."""
    words = "red blue green orange star moon kite box".split()
    rows = [
        {"question": f"a {words[n % 4]} {words[4 + n % 3]} on a", "choices": [words[n % 8], words[(n + 3) % 8]], "answer": n % 2}
        for n in range(23)
    ]  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "scenes.yaml").write_text(TASK.format(name="scenes", rows=folder / "rows.json"))
    return folder


@pytest.fixture
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def test_a_transfusion_scores_as_the_llama_of_its_weights(llama, tokenizer, task_dir, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    ours = TransfusionForConditionalGeneration.from_llama(
        str(tmp_path / "llama"), boi_token_id=3, eoi_token_id=4, image_token_id=5, image_size=8
    ).eval()
    theirs = zero_shot_accuracy(llama, tokenizer, ["scenes"], task_dir=task_dir)
    assert zero_shot_accuracy(ours, tokenizer, ["scenes"], task_dir=task_dir) == theirs
    with torch.no_grad():
        ours.lm_head.weight.copy_(-ours.lm_head.weight)
    assert zero_shot_accuracy(ours, tokenizer, ["scenes"], task_dir=task_dir) != theirs


def test_the_scores_are_those_of_the_log_probabilities(make_cm3leon, code_tokenizer, task_dir):
    """Also of the other family, whose vocabulary has codes of pictures."""
    model = make_cm3leon()
    found = zero_shot_accuracy(model, code_tokenizer, ["scenes"], task_dir=task_dir)
    hits = []
    for row in json.loads((task_dir / "rows.json").read_text()):
        begin = code_tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        sums = []
        for choice in row["choices"]:
            ids = code_tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(scores[n - 1, ids[n]].item() for n in range(len(begin), len(ids))))
        hits.append(sums[row["answer"]] == max(sums))
    assert found["scenes"]["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < found["scenes"]["accuracy"] < 1 and found["mean"] == {"accuracy": found["scenes"]["accuracy"]}
    low, high = found["scenes"]["interval"]
    assert low < found["scenes"]["accuracy"] < high and found["scenes"]["num_questions"] == 23
    assert 0 <= found["scenes"]["normalized_accuracy"] <= 1


def test_bad_tasks_are_refused_by_name(llama, tokenizer, task_dir):
    with pytest.raises(ValueError, match=r"`tasks` has \['hellaswag'\], which are not known here"):
        zero_shot_accuracy(llama, tokenizer, ["hellaswag"], task_dir=task_dir)
    with pytest.raises(ValueError, match="`tasks` is empty"):
        zero_shot_accuracy(llama, tokenizer, [], task_dir=task_dir)
