"""What the training recipes share: model and tokenizers from a recipe's fields, and batches of its rows."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKL, VQModel
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from hf_mm.data.cm3_masking import CM3Masking, SpanArguments
from hf_mm.data.collators import build_collator
from hf_mm.data.documents import DocumentLimit
from hf_mm.data.fingerprints import digest_encoder
from hf_mm.data.formats import iterate_captions
from hf_mm.data.image_encoding import read_manifest
from hf_mm.data.mixing import DocumentArguments, SampleKey, StepSampler
from hf_mm.data.retrieved_documents import RetrievedPairs
from hf_mm.data.sources import EMBEDDED, DatasetArguments
from hf_mm.data.task_documents import TaskContent
from hf_mm.data.text_tokenizer import load_text_tokenizer, train_text_tokenizer
from hf_mm.data.training_documents import CodeDocuments, NoisedDocuments, TrainingDocuments
from hf_mm.training.code_embeddings import embed_patches
from hf_mm.training.optimization import hold_rows
from hf_mm.training.patch_codes import read_patches


NUM_MEASURED = 300  # documents that are built to know their mean


_CODE_RANGE = 0.2  # deviation of embeddings that are not trained, and so do not grow


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
    image_tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Frozen image tokenizer of a new model; with a checkpoint: its own with a decoder trained further."
        },
    )
    trains_code_embeddings: bool = field(
        default=True,
        metadata={
            "help": "False: a new model's embeddings of codes are what these show, for codes of patches; those of a "
            "checkpoint stay."
        },
    )

    def __post_init__(self) -> None:
        """Refuses what describes a new model beside a checkpoint, which has its own."""
        names = ("config_name", "preset", "tokenizer_name")
        given = [name for name in names if getattr(self, name) is not None]
        if self.model_name_or_path is not None and given:
            raise ValueError(
                f"`{given[0]}`={getattr(self, given[0])!r} is for a new model, and `model_name_or_path`="
                f"{self.model_name_or_path!r} is given, which has its own. Set one of the two to none."
            )


@dataclass
class HeldOutArguments:
    """The rows that training does not see."""

    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows; none: the same source."})
    eval_dataset_split: str | None = field(
        default=None,
        metadata={
            "help": "Their split; none: no evaluation. Without a source of their own they come from training's."
        },
    )
    num_eval_documents: int = field(default=256, metadata={"help": "Held-out documents that are evaluated."})


def hold_out(
    pairs: Dataset,
    data_args: DatasetArguments,
    held_out_args: HeldOutArguments,
    prepare: Callable[[DatasetArguments], Dataset],
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Returns the rows to train on and held-out ones; without a split of their own, those of training are both.

    Args:
        pairs (`Dataset`): The rows of training, prepared.
        data_args (`DatasetArguments`): Where they are from.
        held_out_args (`HeldOutArguments`): Where held-out rows are to be from.
        prepare (`Callable`): Opens and prepares a source.
        seed (`int`): Of the choice, where they are taken from training's: a tenth of these at most.
    """
    name, split = held_out_args.eval_dataset_name, held_out_args.eval_dataset_split
    if name is not None or (split and data_args.dataset_name.startswith(EMBEDDED)):
        source = replace(
            data_args,
            dataset_name=name or data_args.dataset_name,
            dataset_split=split or data_args.dataset_split,
            num_scenes=held_out_args.num_eval_documents,
        )
        return pairs, prepare(source)
    if split is not None and len(pairs) > 1:
        num_held_out = min(held_out_args.num_eval_documents, max(len(pairs) // 10, 1))
        parts = pairs.train_test_split(num_held_out, seed=seed)
        return parts["train"], parts["test"]
    return pairs, pairs


def load_config(arguments: ModelArguments) -> Any:
    """Loads or makes the configuration that a recipe names, with the changes it asks for.

    Raises:
        ValueError: If nothing is named, what is named holds no configuration, or a change does not fit it.
    """
    source = arguments.model_name_or_path or arguments.config_name
    if source is not None:
        config = read_config(source)
    elif arguments.preset is not None:
        config = CONFIG_MAPPING[arguments.model_type].from_preset(arguments.preset)
    else:
        raise ValueError("Name what to train: `model_name_or_path`, `config_name` or `preset`.")
    if arguments.config_overrides:
        changed = change_config(config, arguments.config_overrides)
        if source is None:  # built anew, so that what follows from the changed fields follows
            config = CONFIG_MAPPING[arguments.model_type].from_preset(arguments.preset, **changed)
        else:
            config = type(config).from_dict({**config.get_config_dict(source)[0], **changed})
    if arguments.image_tokenizer_name is not None and arguments.model_name_or_path is None:
        config.set_image_tokenizer(arguments.image_tokenizer_name)
    return config


def read_config(source: str) -> Any:
    """Reads the configuration of a model, a JSON file, a folder or a Hub id; refuses what is none."""
    try:
        return AutoConfig.from_pretrained(source)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{source} holds no configuration of a model ({type(error).__name__}: {error}). It must be a JSON object "
            "with a `model_type` and that model's fields, each of its type."
        ) from error


def change_config(config: Any, overrides: str) -> dict[str, Any]:
    """Changes fields of a configuration as `config_overrides` says, and returns them with their values."""
    pairs = overrides.split(",")
    names = [pair.partition("=")[0] for pair in pairs]
    if wrong := [pair for pair in pairs if pair.count("=") != 1]:
        raise ValueError(f"`config_overrides`={overrides!r}: {wrong[0]!r} is no `field=value`.")
    if unknown := [name for name in names if name not in vars(config)]:
        raise ValueError(f"`config_overrides`: {unknown} are no fields of a {type(config).__name__}.")
    try:
        config.update_from_string(overrides)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`config_overrides`={overrides!r} does not fit a {type(config).__name__}: {error}"
        ) from error
    return {name: vars(config)[name] for name in names}


def find_text_tokenizer(
    arguments: ModelArguments, rows: Dataset, run_dir: Path, accelerator: Accelerator, more_texts: Iterable[str] = ()
) -> Any:
    """Loads the text tokenizer; where the recipe names none, it is first trained on the captions and `more_texts`."""
    name = arguments.tokenizer_name or arguments.model_name_or_path or str(run_dir / "text_tokenizer")
    with accelerator.main_process_first():
        if arguments.tokenizer_name is None and arguments.model_name_or_path is None and not Path(name).exists():
            draft = f"{name}.tmp"  # renamed when whole, for a run that is killed meanwhile
            texts = itertools.chain(iterate_captions(rows), more_texts)
            train_text_tokenizer(texts, arguments.vocab_size).save_pretrained(draft)
            Path(draft).rename(name)
    return load_text_tokenizer(name)


def build_model(arguments: ModelArguments, config: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Loads model and processor, or makes new ones; the processor adds its family's tokens to the tokenizer."""
    if arguments.model_name_or_path is not None:
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model_name_or_path, config=config)
        processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
        if reads_codes(model):
            processor.objective = config.objective  # which the recipe may have changed
        if arguments.image_tokenizer_name is not None:
            replace_image_decoder(model, arguments.image_tokenizer_name)
        if not arguments.trains_code_embeddings:
            hold_code_embeddings(model)
        return model, processor
    processor = PROCESSOR_MAPPING[type(config)].from_config(config, tokenizer)
    config.set_tokenizer(processor.tokenizer)
    model = AutoModelForMultimodalLM.from_config(config)
    if arguments.image_tokenizer_name is not None:
        model.load_image_tokenizer(arguments.image_tokenizer_name)
    if not arguments.trains_code_embeddings:
        hold_code_embeddings(model)
        embed_codes(model)
    return model, processor


@torch.no_grad()
def embed_codes(model: Any) -> None:
    """Makes a model's embeddings of codes what these show; see [`embed_patches`].

    Args:
        model (`PreTrainedModel`): With its image tokenizer.

    Raises:
        ValueError: If it has none whose codes are patches of pixels.
    """
    tokenizer = find_image_tokenizer(model)
    patches = read_patches(tokenizer) if isinstance(tokenizer, VQModel) else None
    if patches is None:
        raise ValueError(
            "`trains_code_embeddings`=False needs an `image_tokenizer_name` whose codes are patches of pixels, as "
            "recipes/make_patch_codes.py makes them. Name one, or set it to true."
        )
    ids, weight = model.config.image_token_ids, model.get_input_embeddings().weight
    weight[ids.start : ids.stop] = _CODE_RANGE * embed_patches(patches, weight.shape[1])


def hold_code_embeddings(model: Any) -> None:
    """Keeps a model's embeddings of codes as they are while the rest of it is trained.

    Trained, they forget what codes show: already the first steps move those of all codes, each apart.

    Args:
        model (`PreTrainedModel`): Any, before it is prepared.

    Raises:
        ValueError: If it reads no codes.
    """
    if not reads_codes(model):
        raise ValueError(
            f"`trains_code_embeddings`=False is for models that read codes, and a {type(model).__name__} reads "
            "latents. Set it to true."
        )
    ids = model.config.image_token_ids
    hold_rows(model.get_input_embeddings().weight, slice(ids.start, ids.stop))


def reads_codes(model: Any) -> bool:
    """Whether images are tokens like others, or stand beside them: what its `forward` takes tells."""
    return "latents" not in inspect.signature(type(model).forward).parameters


def find_image_tokenizer(model: Any) -> AutoencoderKL | VQModel | None:
    """Returns the frozen image tokenizer that a model owns, if any."""
    return next((module for module in model.modules() if isinstance(module, AutoencoderKL | VQModel)), None)


def replace_image_decoder(model: Any, name_or_path: str) -> None:
    """Gives a model's image tokenizer another decoder, such as one that `trains_decoder_only` has trained further.

    Args:
        model (`PreTrainedModel`): Owns an image tokenizer.
        name_or_path (`str`): A tokenizer whose encoder is the model's.

    Raises:
        ValueError: If the model has none, or pictures would become something else than what it was trained on.
    """
    own = find_image_tokenizer(model)
    told = f"`image_tokenizer_name`={name_or_path!r}"
    if own is None:
        raise ValueError(f"{told}, but the checkpoint has no image tokenizer. Leave it at none.")
    given = type(own).from_pretrained(name_or_path, use_safetensors=True)
    scales = [[tokenizer.config.get(key) for key in ("scaling_factor", "shift_factor")] for tokenizer in (own, given)]
    if digest_encoder(own) != digest_encoder(given) or scales[0] != scales[1]:
        raise ValueError(
            f"{told} encodes pictures in another way than the checkpoint's tokenizer, which the model was trained on. "
            "Name one with the same encoder and scale, or leave it at none."
        )
    own.load_state_dict(given.state_dict())


def refuse_pixels(rows: Dataset, name: str) -> None:
    """Refuses rows with pixels where they are read beside latents.

    Args:
        rows (`Dataset`): Encoded before, or documents of parts.
        name (`str`): The recipe's name of them.

    Raises:
        ValueError: If a row has a picture that no VAE has encoded.
    """
    documents = rows["content"] if "content" in rows.column_names else ()
    if "pixels" in rows.column_names or any(part["type"] == "image" for parts in documents for part in parts):
        raise ValueError(
            f"`dataset_name`={name!r} holds pixels, and the model reads latents of its VAE. Encode the pictures with "
            "recipes/encode_images.py and that VAE as `image_tokenizer_name`, and name the folder."
        )


def refuse_unfit_rows(rows: Dataset, name: str, model: Any, *, field: str = "dataset_name") -> None:
    """Refuses rows whose images the model cannot read, or that another image tokenizer encoded than its own.

    Args:
        rows (`Dataset`): As opened.
        name (`str`): The recipe's name of them.
        model (`PreTrainedModel`): To be trained on them.
        field (`str`, defaults to `"dataset_name"`): What an error calls the name.

    Raises:
        ValueError: If they do not fit.
    """
    columns = set(rows.column_names)
    if reads_codes(model) and not columns & {"codes", "content"}:
        raise ValueError(
            f"`{field}`={name!r} has no column `codes`, and the model reads nothing else in training. Encode it "
            "with recipes/encode_images.py and the model's image tokenizer, and name the folder. Columns here: "
            f"{rows.column_names}."
        )
    if not reads_codes(model) and "codes" in columns:
        raise ValueError(
            f"`{field}`={name!r} holds codes, and the model reads pixels or latents. Encode the images with an "
            "AutoencoderKL, or as pixels."
        )
    manifest = read_manifest(name)
    if manifest is None or "weights" not in manifest["encoder"]:
        return
    made_by, tokenizer = manifest["encoder"], find_image_tokenizer(model)
    if tokenizer is None:
        raise ValueError(
            f"`{field}`={name!r} was encoded with the image tokenizer {made_by['image_tokenizer_name']!r}, and "
            "the model has none to draw with. Name it as `image_tokenizer_name`."
        )
    own = {"weights": digest_encoder(tokenizer)}
    own |= {key: tokenizer.config[key] for key in ("scaling_factor", "shift_factor") if key in made_by}
    if different := {key: (made_by[key], value) for key, value in own.items() if made_by[key] != value}:
        raise ValueError(
            f"`{field}`={name!r} was encoded with another image tokenizer than the model's, "
            f"{made_by['image_tokenizer_name']!r}: {different} (there, here). Encode the images again, or name that "
            "tokenizer."
        )


def choose_documents(model: Any, spans: SpanArguments) -> tuple[type[TrainingDocuments], dict[str, Any], int]:
    """Returns the kind of documents a model is trained on, what they need of it, and the tokens they may grow by."""
    config = model.config
    if reads_codes(model):
        spans = spans.for_objective(config.objective)
        if config.objective == "causal":
            return CodeDocuments, {"masking": None}, 0
        masking = CM3Masking(
            **asdict(spans),
            break_token_id=config.break_token_id,
            eos_token_id=config.eos_token_id,
            eoss_token_id=config.eoss_token_id,
            first_sentinel_token_id=config.first_sentinel_token_id,
            num_sentinel_tokens=config.num_sentinel_tokens,
        )
        return CodeDocuments, {"masking": masking}, masking.max_added_tokens
    side = config.image_size // config.vae_stride
    fields = {
        "image_size": config.image_size,
        "latent_shape": (config.latent_channels, side, side),
        "sample_timesteps": model.timestep_sampler(),
    }
    return NoisedDocuments, fields, 0


class DocumentBatches:
    """Makes batches of a model's documents from rows, the same for training and for evaluation.

    Args:
        model (`PreTrainedModel`): Gives the timesteps and shapes of its images, or the ids of its codes' delimiters.
        processor (`ProcessorMixin`): Lays documents out.
        arguments (`DocumentArguments`): Order, dropout, noise cap and windows.
        spans (`SpanArguments`): Masked spans, in models that read codes and are not causal.
        form_weights (`dict`): Chances of the caption forms.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        arguments: DocumentArguments,
        spans: SpanArguments,
        form_weights: dict[str, float],
    ) -> None:
        self.processor, self.window_length = processor, arguments.window_length
        longest = model.config.get_text_config().max_position_embeddings
        max_tokens = min(self.window_length or longest, longest)
        self.encodes_pictures = not reads_codes(model) and find_image_tokenizer(model) is not None
        kind, fields, num_reserved = choose_documents(model, spans)
        self.limit = DocumentLimit(max_tokens - num_reserved, processor.tokens_per_image(), processor.tokenizer)
        self.documents: Callable[..., TrainingDocuments] = partial(
            kind,
            processor=processor,
            arguments=arguments,
            form_weights=form_weights,
            max_tokens=max_tokens,
            **fields,
        )

    def refuse_no_caption_room(self) -> None:
        """Refuses windows that hold no pair.

        Raises:
            ValueError: If beside a picture no token of a caption fits.
        """
        if (room := self.limit.caption_room) < 1:
            raise ValueError(
                f"`window_length`={self.window_length} (none: the model's `max_position_embeddings`) has no room for "
                f"a picture and a caption. Raise it by at least {1 - room}."
            )

    def retrieve(self, retrieval: RetrievedPairs) -> None:
        """Puts retrieved pairs in front of those that have neighbours, from now on.

        Raises:
            ValueError: If pictures alone exceed a window, so that as many pairs would never be there.
        """
        num_pairs = max(retrieval.counts) + 1
        needed = num_pairs * (self.limit.tokens_per_image + 1) + num_pairs + 1  # a token for each caption
        if needed > self.limit.max_tokens:
            raise ValueError(
                f"`retrieved_counts`={retrieval.counts}: {num_pairs} pairs have at least {needed} tokens, and a "
                f"window has room for {self.limit.max_tokens} beside masked spans. Lower them, or raise "
                "`window_length` or the model's `max_position_embeddings`."
            )
        self.documents = partial(self.documents, retrieval=retrieval)

    def fill_tasks(self, content: TaskContent) -> None:
        """Fills the templates of rows that have a task, from now on."""
        self.documents = partial(self.documents, task_content=content)

    def report_retrieval(self, rows: Dataset) -> str:
        """Says how many retrieved pairs documents have, and how many did not fit, over a few hundred."""
        documents = self.documents(rows, seed=0)
        drawn = [documents[SampleKey(number, 0, number)] for number in range(min(len(rows), NUM_MEASURED))]
        kept, left_out = (sum(document[name] for document in drawn) for name in ("num_retrieved", "num_left_out"))
        return (
            f"Retrieval: {kept / len(drawn):.2f} pairs in front of each in the mean of {len(drawn)} documents; "
            f"{left_out} of {kept + left_out} were left out, for their windows had no room."
        )

    def collator(self, rows: Dataset) -> Any:
        """Returns the collator for documents of these rows; pictures that are not encoded go to the model as such."""
        is_encoded = not self.encodes_pictures or "latent_mean" in rows.column_names
        image_key = "latents" if is_encoded else "pixel_values"
        return build_collator(self.processor.tokenizer.pad_token_id, self.window_length, image_key)

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
        """Mean length of a source's documents, over a few hundred from all of it: rows may come in an order."""
        documents = self.documents(rows, text_rows=text_rows, seed=0)
        num_rows = len(rows if source == 0 else text_rows)  # type: ignore[arg-type]
        count = min(num_rows, NUM_MEASURED)
        keys = [SampleKey(number, source, number * num_rows // count) for number in range(count)]
        return sum(len(documents[key]["input_ids"]) for key in keys) / len(keys)
