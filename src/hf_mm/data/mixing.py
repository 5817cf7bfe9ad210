"""Which row becomes which training sample, and what document it becomes.

Every sample has a number, and what it holds is a function of the seed and that number alone: which row, whether the
caption comes first, whether it is dropped. So a run resumes at any step, and any number of processes and workers
draws the same samples. Knows rows and numbers, neither models nor tensors of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .caption_text import sample_caption


@dataclass
class DocumentArguments:
    """How rows become documents. Section and table numbers are those of Transfusion (arXiv 2408.11039)."""

    image_first_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of pairs whose image comes before the caption; none: 0.2 (Sec. 4.1), and 0 for models that "
            "caption by filling in (CM3Leon, arXiv 2309.02591, Figs. 8 and 9)."
        },
    )
    caption_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Share of caption-first pairs without their caption, for guidance; none: 0.1, ours, the usual "
            "value. Models that fill in have masked captions instead."
        },
    )
    noise_cap: int | None = field(
        default=None,
        metadata={
            "help": "Timesteps below which image-first images are noised, in models that noise them. Table 8: 500."
        },
    )
    samples_latents: bool = field(
        default=True,
        metadata={
            "help": "Whether latents that were encoded before are sampled from what the VAE says of a picture, as in "
            "latent diffusion (arXiv 2112.10752); false: their mean, without noise that nothing can predict."
        },
    )
    window_length: int | None = field(
        default=None,
        metadata={"help": "Pack documents into windows of that length; none: each is padded to a batch's longest."},
    )
    text_token_share: float = field(
        default=0.5, metadata={"help": "Share of tokens from the text-only rows, if there are any. Sec. 4.1: 1:1."}
    )

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        for name in ("image_first_share", "caption_dropout"):
            if (value := vars(self)[name]) is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}`={value} must be in [0, 1].")
        if not 0 < self.text_token_share < 1:
            raise ValueError(f"`text_token_share`={self.text_token_share} must be above 0 and below 1.")
        if self.noise_cap is not None and self.noise_cap < 1:
            raise ValueError(f"`noise_cap`={self.noise_cap} must be at least 1. None switches it off.")

    def with_defaults(self, *, image_first_share: float, caption_dropout: float) -> "DocumentArguments":
        """Returns a copy in which shares that are None have these values."""
        if self.image_first_share is not None:
            image_first_share = self.image_first_share
        if self.caption_dropout is not None:
            caption_dropout = self.caption_dropout
        return replace(self, image_first_share=image_first_share, caption_dropout=caption_dropout)


@dataclass(frozen=True)
class SampleKey:
    """Names one training sample: its number, the source it is drawn from (0 pairs, 1 text) and the row there."""

    number: int
    source: int
    row: int


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Makes the generator of one sample, the same wherever and whenever it is drawn."""
    state = np.random.SeedSequence((seed, number)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def build_content(
    row: dict[str, Any],
    arguments: DocumentArguments,
    generator: torch.Generator,
    form_weights: dict[str, float] | None = None,
) -> tuple[list[dict[str, Any]], int | None]:
    """Lays out the document of a row: a pair in either order, a document as it stands, or text alone.

    Args:
        row (`dict`): A pair, a document (`content`), or a row with `text` and no image.
        arguments (`DocumentArguments`): The shares, none of them None.
        generator (`torch.Generator`): The sample's.
        form_weights (`dict`, *optional*): Chances of the caption forms, see `sample_caption`.

    Returns:
        The parts `{"type": "text", "text"}` and `{"type": "image"}` in order, and the noise cap of its images.
    """
    if "content" in row:
        return row["content"], None
    caption = sample_caption(row, generator, form_weights) if form_weights else sample_caption(row, generator)
    text, image = {"type": "text", "text": caption}, {"type": "image"}
    if not {"image", "pixels", "latent_mean", "codes"} & row.keys():
        return [text], None
    draws = torch.rand(2, generator=generator)
    if draws[0] < arguments.image_first_share:
        return [image, text], arguments.noise_cap
    if draws[1] < arguments.caption_dropout:
        return [image], None
    return [text, image], None


class StepSampler(torch.utils.data.Sampler[list[SampleKey]]):
    """Batches of sample keys for one process, from any step on, without end.

    Rows come in a new order each epoch, or by weight with replacement. Text-only rows are spread evenly among the
    pairs, so that each holds its share of tokens.

    Args:
        num_rows (`int`): Pair rows.
        batch_size (`int`): Samples in a micro-batch of one process.
        seed (`int`): Of the order.
        batches_per_step (`int`, defaults to 1): Micro-batches of one process in an optimizer step.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): All processes.
        first_step (`int`, defaults to 0): Steps that are done already.
        num_text_rows (`int`, defaults to 0): Rows of the text-only source.
        text_document_share (`float`, defaults to 0.0): Share of samples from that source; see `document_share`.
        weights (`Sequence[np.ndarray]`, *optional*): Row weights in most of training and in its last part.
        final_step (`int`, *optional*): Step from which the second weights hold.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        *,
        batches_per_step: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        first_step: int = 0,
        num_text_rows: int = 0,
        text_document_share: float = 0.0,
        weights: Sequence[np.ndarray] | None = None,
        final_step: int | None = None,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"`num_rows`={num_rows}: there is nothing to draw from.")
        self.sizes = (num_rows, num_text_rows)
        self.batch_size, self.seed, self.first_step = batch_size, seed, first_step
        self.batches_per_step, self.process_index, self.num_processes = batches_per_step, process_index, num_processes
        self.text_document_share = text_document_share if num_text_rows else 0.0
        self.cumulative = None if weights is None else [np.cumsum(part) for part in weights]
        self.final_number = None if final_step is None else final_step * self.samples_per_step
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def samples_per_step(self) -> int:
        """Samples of all processes in one optimizer step."""
        return self.batch_size * self.batches_per_step * self.num_processes

    def __iter__(self) -> Iterator[list[SampleKey]]:
        number = self.first_step * self.samples_per_step
        while True:
            start = number + self.process_index * self.batch_size
            yield [self.key(sample) for sample in range(start, start + self.batch_size)]
            number += self.batch_size * self.num_processes

    def key(self, number: int) -> SampleKey:
        """Returns the key of one sample."""
        texts_before = int(number * self.text_document_share)
        if int((number + 1) * self.text_document_share) > texts_before:
            return SampleKey(number, 1, self._shuffled(1, texts_before))
        if self.cumulative is None:
            return SampleKey(number, 0, self._shuffled(0, number - texts_before))
        is_final = self.final_number is not None and number >= self.final_number
        cumulative = self.cumulative[-1] if is_final else self.cumulative[0]
        draw = np.random.default_rng((self.seed, number)).random() * cumulative[-1]
        return SampleKey(number, 0, min(int(np.searchsorted(cumulative, draw, side="right")), self.sizes[0] - 1))

    def _shuffled(self, source: int, position: int) -> int:
        """Row at a position of the endless reshuffled order of a source; keeps the order of one epoch."""
        epoch, place = divmod(position, self.sizes[source])
        if self._orders.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, source, epoch))
            self._orders[source] = (epoch, rng.permutation(self.sizes[source]))
        return int(self._orders[source][1][place])


def document_share(token_share: float, mean_text_tokens: float, mean_pair_tokens: float) -> float:
    """Converts a share of tokens to a share of documents of different lengths.

    Example:
        >>> round(document_share(0.5, mean_text_tokens=300, mean_pair_tokens=100), 6)
        0.25

    """
    texts, pairs = token_share / mean_text_tokens, (1 - token_share) / mean_pair_tokens
    return texts / (texts + pairs)
