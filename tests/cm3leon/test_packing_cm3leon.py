import pytest
import torch

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, modeling_cm3leon, packing_cm3leon
from hf_mm.cm3leon.packing_cm3leon import find_documents


LENGTHS = [[100, 61], [161], [31, 7, 123]]  # of the documents of each row
NUM_CODES, FIRST_CODE = 13, 41


@pytest.fixture
def every_document_pays(monkeypatch):
    monkeypatch.setattr(packing_cm3leon, "PAIRS_PER_CALL", 0)


@pytest.fixture
def no_mask(monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask of all pairs was built")

    monkeypatch.setattr(modeling_cm3leon, "create_causal_mask", refuse)


def build_model(**fields):
    torch.manual_seed(0)
    config = CM3LeonConfig(
        vocab_size=61,
        image_vocab_size=NUM_CODES,
        first_image_token_id=FIRST_CODE,
        break_token_id=54,
        eoss_token_id=55,
        image_token_id=56,
        first_sentinel_token_id=57,
        num_sentinel_tokens=3,
        hidden_size=22,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=170,
        initializer_range=0.4,
        image_size=24,
        **fields,
    )
    model = CM3LeonForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:  # zero at the start, where nothing could be told apart
            torch.nn.init.normal_(weight, std=0.4)
    return model.train()


def make_batch():
    ids = torch.randint(5, 40, (len(LENGTHS), 161), generator=torch.Generator().manual_seed(1))
    ids[:, 20:29] = torch.arange(FIRST_CODE, FIRST_CODE + 9)  # an image of nine codes in the first document of each
    positions = [torch.cat([torch.arange(length) for length in row]) for row in LENGTHS]
    return {"input_ids": ids, "labels": ids, "position_ids": torch.stack(positions)}


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("image_positions", ["running", "grid", "rotary"])
def test_documents_apart_give_the_loss_and_gradients_of_one_mask_over_all(
    every_document_pays, no_mask, monkeypatch, image_positions
):
    loss, gradients = loss_and_gradients(build_model(image_positions=image_positions), make_batch())
    monkeypatch.undo()
    eager = build_model(image_positions=image_positions, attn_implementation="eager")
    expected_loss, expected = loss_and_gradients(eager, make_batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_a_token_is_seen_by_what_follows_in_its_document_alone(every_document_pays, no_mask):
    model, batch = build_model().double().eval().model, make_batch()
    batch.pop("labels")
    before = model(**batch, use_cache=False).last_hidden_state
    batch["input_ids"][2, 33] = 3
    moved = (model(**batch, use_cache=False).last_hidden_state - before).abs().amax(-1).nonzero().tolist()
    assert moved == [[2, place] for place in range(33, 38)]


def test_gradient_checkpointing_changes_nothing(every_document_pays, no_mask):
    loss, gradients = loss_and_gradients(build_model(), make_batch())
    model = build_model()
    model.activation_checkpointing_enable()
    again, same = loss_and_gradients(model, make_batch())
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(gradients["model.embed_tokens.weight"], same["model.embed_tokens.weight"])


def test_documents_are_found_in_every_row(every_document_pays):
    assert find_documents(make_batch()["position_ids"], 3) == sum(LENGTHS, [])
    assert find_documents(torch.arange(20)[None] % 10, num_rows=2) == [10, 10, 10, 10]


def test_rows_of_one_document_keep_the_kernel_s_own_mask(every_document_pays):
    assert find_documents(torch.arange(500).expand(3, -1), 3) is None


def test_documents_too_short_to_pay_for_a_call_are_read_under_one_mask():
    short = torch.arange(96)[None] % 24
    assert find_documents(short, 1) is None
    assert find_documents(torch.arange(1024)[None] % 256, 1) == [256] * 4


def test_a_mask_or_a_cache_keeps_the_library_s_way(every_document_pays):
    """Positions of padding restart too, which is no packing where a mask tells of it."""
    model = build_model().eval()
    ids = torch.tensor([[0, 0, 2, 11, 12]])
    mask, positions = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 2]])
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = model(input_ids=ids[:, 2:])
    torch.testing.assert_close(out.logits[:, 2:], alone.logits, rtol=1e-4, atol=1e-4)
