import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from hf_mm.training.contrastive import ContrastiveTrainer


@pytest.fixture
def clip():
    tower = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 31, "max_position_embeddings": 7, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 30}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, **text},
            vision_config={**tower, "image_size": 10, "patch_size": 5},
            projection_dim=11,
        )
    )


def make_batch(caption_ids):
    ids = torch.randint(2, 30, (len(caption_ids), 5))
    for row, caption in enumerate(caption_ids):
        ids[row, :4] = torch.tensor([1, 2 + caption % 7, 9 + caption % 3, 12])
    ids[:, 4] = 30
    return {
        "pixel_values": torch.randn(len(caption_ids), 3, 10, 10),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "caption_ids": torch.tensor(caption_ids),
    }


def test_loss_is_the_models_own_where_all_captions_differ(clip):
    batch = make_batch([5, -3, 2, 11, 6])
    output = ContrastiveTrainer(clip)(**batch)
    batch.pop("caption_ids")
    own = clip(**batch, return_loss=True)
    torch.testing.assert_close(output.loss, own.loss)
    torch.testing.assert_close(output.loss, (output.image_to_text_loss + output.text_to_image_loss) / 2)


def test_equal_captions_are_positives_of_each_other(clip):
    captions = [4, 4, 9, 4, 6]
    batch = make_batch(captions)
    output = ContrastiveTrainer(clip)(**batch)
    batch.pop("caption_ids")
    logits = clip(**batch).logits_per_image
    for found, scores in ((output.image_to_text_loss, logits), (output.text_to_image_loss, logits.T)):
        chances = F.log_softmax(scores, dim=1)
        expected = 0.0
        for row, caption in enumerate(captions):
            equal = [column for column, other in enumerate(captions) if other == caption]
            expected -= sum(chances[row, column] for column in equal) / len(equal) / len(captions)
        torch.testing.assert_close(found, expected)


def test_losses_of_micro_batches_add_up_to_their_mean(clip):
    trainer, first, second = ContrastiveTrainer(clip), make_batch([1, 2, 3]), make_batch([4, 5, 6])
    counts = sum(ContrastiveTrainer.count_targets(batch)["num_images_in_batch"] for batch in (first, second))
    together = sum(trainer(**batch, num_images_in_batch=counts).loss for batch in (first, second))
    torch.testing.assert_close(together, (trainer(**first).loss + trainer(**second).loss) / 2)


def test_the_scale_of_the_logits_has_a_limit(clip):
    batch = make_batch([1, 2, 3])
    with torch.no_grad():
        clip.logit_scale.fill_(100.0**0.5)
        unlimited = ContrastiveTrainer(clip)(**batch).loss
        clip.logit_scale.fill_(torch.tensor(100.0).log())
        torch.testing.assert_close(ContrastiveTrainer(clip)(**batch).loss, unlimited)


def test_pictures_and_captions_are_compared_in_float32_under_autocast(clip):
    """bf16 would round logits near 100 to halves; the embeddings themselves may be of bf16."""
    batch = make_batch([5, -3, 2, 11, 6])
    with torch.no_grad():
        clip.logit_scale.fill_(torch.tensor(100.0).log())
        with torch.autocast("cpu", torch.bfloat16):
            found = ContrastiveTrainer(clip)(**batch).image_to_text_loss
            batch.pop("caption_ids")
            embeddings = clip(**batch)
        logits = 100 * embeddings.image_embeds.float() @ embeddings.text_embeds.float().T
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.arange(5)), rtol=1e-4, atol=1e-4)
