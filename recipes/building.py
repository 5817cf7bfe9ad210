"""What the training recipes share: model and tokenizers from a recipe's fields, and batches of its rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from hf_mm.data.collators import TrainingDocuments, build_collator
from hf_mm.data.formats import iterate_captions
from hf_mm.data.mixing import DocumentArguments, SampleKey, StepSampler
from hf_mm.data.text_tokenizer import load_text_tokenizer, train_text_tokenizer


@dataclass
class ModelArguments:
    """What is trained: a checkpoint, or a new model of a configuration file or a preset."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to train further."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a new model, a JSON file."})
    model_type: str = field(default="transfusion", metadata={"help": "Family of a new model made from a preset."})
    preset: str | None = field(default=None, metadata={"help": "Size of a new model, such as 0.16B."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changed fields of the configuration: patch_size=4,patch_layer=unet"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Text tokenizer; none: trained on the captions."}
    )
    vocab_size: int = field(default=512, metadata={"help": "Size of a text tokenizer trained here."})
    image_tokenizer_name: str | None = field(default=None, metadata={"help": "Frozen image tokenizer of a new model."})


def load_config(arguments: ModelArguments) -> Any:
    """Loads or makes the configuration that a recipe names, with the changes it asks for."""
    source = arguments.model_name_or_path or arguments.config_name
    if source is not None:
        config = AutoConfig.from_pretrained(source)
    elif arguments.preset is not None:
        config = CONFIG_MAPPING[arguments.model_type].from_preset(arguments.preset)
    else:
        raise ValueError("Name what to train: `model_name_or_path`, `config_name` or `preset`.")
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
        changed = {
            pair.split("=")[0]: vars(config)[pair.split("=")[0]] for pair in arguments.config_overrides.split(",")
        }
        if source is None:  # built anew, so that what follows from the changed fields follows
            config = CONFIG_MAPPING[arguments.model_type].from_preset(arguments.preset, **changed)
        else:
            config = type(config).from_dict({**config.get_config_dict(source)[0], **changed})
    if arguments.image_tokenizer_name is not None:
        config.set_image_tokenizer(arguments.image_tokenizer_name)
    return config


def find_text_tokenizer(arguments: ModelArguments, rows: Dataset, run_dir: Path, accelerator: Accelerator) -> Any:
    """Loads the text tokenizer; where the recipe names none, it is first trained on the captions of the rows."""
    name = arguments.tokenizer_name or arguments.model_name_or_path or str(run_dir / "text_tokenizer")
    with accelerator.main_process_first():
        if arguments.tokenizer_name is None and arguments.model_name_or_path is None and not Path(name).exists():
            draft = f"{name}.tmp"  # renamed when whole, for a run that is killed meanwhile
            train_text_tokenizer(iterate_captions(rows), arguments.vocab_size).save_pretrained(draft)
            Path(draft).rename(name)
    return load_text_tokenizer(name)


def build_model(arguments: ModelArguments, config: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Loads model and processor, or makes new ones that fit the tokenizer."""
    if arguments.model_name_or_path is not None:
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model_name_or_path, config=config)
        return model, AutoProcessor.from_pretrained(arguments.model_name_or_path)
    config.set_tokenizer(tokenizer)
    model = AutoModelForMultimodalLM.from_config(config)
    if arguments.image_tokenizer_name is not None:
        model.load_image_tokenizer(arguments.image_tokenizer_name)
    return model, PROCESSOR_MAPPING[type(config)].from_config(config, tokenizer)


class DocumentBatches:
    """Makes batches of a model's documents from rows, the same for training and for evaluation.

    Args:
        model (`PreTrainedModel`): Gives the timesteps and the shapes of its images.
        processor (`ProcessorMixin`): Lays documents out.
        arguments (`DocumentArguments`): Order, dropout and noise cap.
        form_weights (`dict`): Chances of the caption forms.
        window_length (`int`, *optional*): Packs documents into windows.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        arguments: DocumentArguments,
        form_weights: dict[str, float],
        window_length: int | None,
    ) -> None:
        self.has_image_tokenizer = model.config.vae_config is not None
        self.pad_token_id, self.window_length = processor.tokenizer.pad_token_id, window_length
        side = model.config.image_size // model.config.vae_stride
        self.documents = partial(
            TrainingDocuments,
            processor=processor,
            image_size=model.config.image_size,
            latent_shape=(model.config.latent_channels, side, side),
            sample_timesteps=model.timestep_sampler(),
            arguments=arguments,
            form_weights=form_weights,
            max_tokens=window_length or model.config.text_config.max_position_embeddings,
        )

    def collator(self, rows: Dataset) -> Any:
        """Returns the collator for documents of these rows; pictures that are not encoded go to the model as such."""
        is_encoded = not self.has_image_tokenizer or "latent_mean" in rows.column_names
        return build_collator(self.pad_token_id, self.window_length, "latents" if is_encoded else "pixel_values")

    def endless(
        self, rows: Dataset, text_rows: Dataset | None, sampler: StepSampler, seed: int, num_workers: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Reads training batches in the sampler's order; the number of workers changes nothing but the speed."""
        loader = DataLoader(
            self.documents(rows, text_rows=text_rows, seed=seed),
            batch_sampler=sampler,
            collate_fn=self.collator(rows),
            num_workers=num_workers,
            generator=torch.Generator(),  # of its own, so that starting workers draws nothing from the global one
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def fixed(
        self, rows: Dataset, num_documents: int, batch_size: int, seed: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Reads the first documents of held-out rows, noised the same way each time."""
        documents, collate = self.documents(rows, seed=seed), self.collator(rows)
        keys = [SampleKey(number, 0, number) for number in range(min(num_documents, len(rows)))]
        for start in range(0, len(keys), batch_size):
            yield collate([documents[key] for key in keys[start : start + batch_size]])

    def mean_tokens(self, rows: Dataset, text_rows: Dataset | None, source: int) -> float:
        """Mean length of a source's documents, over a few hundred."""
        documents = self.documents(rows, text_rows=text_rows, seed=0)
        num_rows = len(rows if source == 0 else text_rows)  # type: ignore[arg-type]
        keys = [SampleKey(number, source, number) for number in range(min(num_rows, 300))]
        return sum(len(documents[key]["input_ids"]) for key in keys) / len(keys)
