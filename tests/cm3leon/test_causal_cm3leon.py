"""A model trained on causal documents: its prompts, guidance, captions, and what it refuses."""

import pytest
import torch
from transformers import AutoProcessor

import hf_mm
from hf_mm.cm3leon import CM3LeonForConditionalGeneration, CM3LeonPipeline, CM3LeonProcessor, CodeSampling


@pytest.fixture(scope="module", params=["cm3leon", "chameleon"])
def pipe(request, make_model, make_processor):
    fields = {"decoder_block": "chameleon", "hidden_act": "silu", "tie_word_embeddings": False}
    fields = fields if request.param == "chameleon" else {}
    model = make_model(objective="causal", image_positions="grid", **fields)
    pipe = CM3LeonPipeline(model, make_processor(model.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def greedy_image(pipe, streams, scale):
    """Draws by two forwards for each code, without padding and without a cache."""
    model, config, codes = pipe.model, pipe.model.config, []
    for _ in range(config.tokens_per_image):
        cond, uncond = (
            model(input_ids=torch.tensor([row + codes])).logits[0, -1, config.first_image_token_id :][
                : config.image_vocab_size
            ]
            for row in streams
        )
        codes.append(int((uncond + scale * (cond - uncond)).argmax()) + config.first_image_token_id)
    return [code - config.first_image_token_id for code in codes]


def text_ids(pipe, text):
    return pipe.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_guidance_leads_away_from_a_document_that_opens_with_an_image(pipe):
    eos, opening = pipe.model.config.eos_token_id, pipe.model.config.break_token_id
    assert pipe.processor.unconditional_prompt() == pipe.model.unconditional_prompt() == [eos]
    prompts = ["a red star on a white background", "kite"]
    drawn = pipe(prompts, guidance_scale=2.5, do_sample=False, output_type="codes").images.tolist()
    rows = [[eos, *text_ids(pipe, prompt), opening] for prompt in prompts]
    assert drawn == [greedy_image(pipe, (row, [eos]), 2.5) for row in rows]
    assert drawn != [greedy_image(pipe, (row, [eos]), 1.0) for row in rows]


def test_several_images_of_a_prompt_are_guided_alike(pipe):
    ids = torch.tensor([[pipe.model.config.eos_token_id, *text_ids(pipe, "kite"), pipe.model.config.break_token_id]])
    greedy = CodeSampling(guidance_scale=2.5, do_sample=False)
    one = pipe.model.draw_images(ids, sampling=greedy)
    several = pipe.model.draw_images(ids, sampling=greedy, num_images_per_prompt=3)
    assert torch.equal(several, one.expand(3, -1))


def test_an_empty_prompt_is_a_document_that_opens_with_an_image(pipe):
    eos, opening = pipe.model.config.eos_token_id, pipe.model.config.break_token_id
    drawn = pipe(["", "kite"], guidance_scale=2.5, do_sample=False, output_type="codes").images.tolist()
    streams = ([eos], [eos]), ([eos, *text_ids(pipe, "kite"), opening], [eos])
    assert drawn == [greedy_image(pipe, pair, 2.5) for pair in streams]
    alone = pipe("", do_sample=False, output_type="codes").images.tolist()
    assert alone == drawn[:1]


def test_captions_follow_their_image(pipe, picture):
    model, processor, config = pipe.model, pipe.processor, pipe.model.config
    pixel_values = processor.image_processor([picture()], return_tensors="pt")["pixel_values"]
    image = model.encode_images(pixel_values)[0].tolist()
    codes = [token - config.first_image_token_id for token in image]
    known = [config.eos_token_id, *image, config.break_token_id]
    assert processor.caption_prompt("", codes) == known
    assert processor.caption_prompt("a red ", codes) == [*known, *text_ids(pipe, "a red")]
    asked = processor(images=[picture()], return_tensors="pt")
    assert model.model.place_images(asked["input_ids"], asked["pixel_values"])[0].tolist() == known

    for prompt in ("", "a red"):
        row = [*known, *text_ids(pipe, prompt)]
        start = len(row)
        never = torch.tensor(sorted({*config.image_token_ids, config.break_token_id}.union(*model.never_written)))
        never = never[never != config.eoss_token_id]
        while len(row) < start + 7 and row[-1] not in (config.eos_token_id, config.eoss_token_id):
            scores = model(input_ids=torch.tensor([row])).logits[0, -1]
            row.append(int(scores.index_fill(0, never, -torch.inf).argmax()))
        expected = processor.tokenizer.decode(row[start:], skip_special_tokens=True).strip()
        assert pipe.caption(picture(), prompt=prompt, max_new_tokens=7) == [expected]


def test_nothing_is_filled_in(pipe, picture):
    told = "`objective`='causal': this model was trained on whole documents and cannot fill in"
    with pytest.raises(ValueError, match=told):
        pipe.infill_caption(picture(), "a ___ star")
    with pytest.raises(ValueError, match=told):
        pipe.infill_region(picture(), box=(0, 0, 8, 8))
    with pytest.raises(ValueError, match=told):
        pipe.processor.infill_prompt([{"type": "mask"}])


def test_a_processor_of_another_objective_than_the_models_is_refused(pipe, make_processor, make_config):
    with pytest.raises(ValueError, match="`processor` has `objective`='cm3' and `model` 'causal'"):
        CM3LeonPipeline(pipe.model, make_processor(make_config()))
    with pytest.raises(ValueError, match="`objective`='prefix' must be one of"):
        CM3LeonProcessor(pipe.processor.image_processor, pipe.processor.tokenizer, objective="prefix")


def test_a_saved_folder_keeps_blocks_and_objective(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = CM3LeonPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (again.processor.objective, again.model.config.objective) == ("causal", "causal")
    assert again.model.config.decoder_block == pipe.model.config.decoder_block
    ask = {"guidance_scale": 2.5, "do_sample": False, "output_type": "codes"}
    assert torch.equal(again("kite", **ask).images, pipe("kite", **ask).images)


def test_folders_from_before_fill_in():
    folder = hf_mm.CHECKPOINTS / "cm3leon-tiny"
    config = CM3LeonForConditionalGeneration.from_pretrained(folder).config
    assert (config.objective, config.decoder_block, config.z_loss_weight) == ("cm3", "cm3leon", 0)
    assert AutoProcessor.from_pretrained(folder).objective == "cm3"
