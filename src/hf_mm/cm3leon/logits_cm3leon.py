"""What happens to next-token scores: guidance, contrastive decoding, image spans of exact length, reproducible draws.

Logits processors for the library's own `generate`. They know ranges of ids, no model and no string, so they serve any
decoder over text and image codes. None asks the device a question or loops over rows.
"""

# Axes: S streams (conditional first, unconditional last), B rows, V vocabulary, L sequence, N codes of an image.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper


DECODINGS = ("top_p", "contrastive", "mixed")

# Where two streams are set against each other, a score beyond this counts as this, so that what one of them holds
# impossible, or certain, has a finite difference. The largest number of float16: its exponential is 0 or infinite.
SCORE_LIMIT = torch.finfo(torch.float16).max
FLOAT = torch.finfo(torch.float32)


def temper(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divides scores by a temperature, in float32, the best of each row at 0, so that none is too low to divide by.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`): `-inf` excludes, and still does afterwards.
        temperature (`float`): Above 0, and finite.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, vocab_size)`: 0 and below.

    Example:
        >>> temper(torch.tensor([[3e38, 2e38, -torch.inf]]), temperature=0.1)
        tensor([[0., -inf, -inf]])

    """
    scores = scores.float().clamp(max=FLOAT.max)
    return (scores - scores.amax(-1, keepdim=True).clamp(min=FLOAT.min)) / max(float(temperature), FLOAT.tiny)


def contrastive_top_k(
    cond_logits: torch.Tensor, uncond_logits: torch.Tensor, *, k: int, alpha: float, amateur_temperature: float = 1.0
) -> torch.Tensor:
    r"""Scores tokens by how much the prompt raises their probability, among those the prompt makes plausible.

    CD-K keeps token `w` when `p_cond(w) >= alpha * (k-th largest p_cond)` and scores it
    `log p_cond(w) - log p_uncond(w)`. With `k=1` this is ordinary contrastive decoding.

    Args:
        cond_logits (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
            Unnormalised log-probabilities from the stream that sees the prompt, the expert.
        uncond_logits (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
            The same from the stream whose prompt is a sentinel, the amateur.
        k (`int`):
            Rank whose probability sets the plausibility bar, `1 <= k <= vocab_size`, equal ones counted each. Where
            fewer tokens have any probability, the least probable of them sets it.
        alpha (`float`): Fraction of that probability a token must reach, in `[0, 1]`. 0 keeps every possible token.
        amateur_temperature (`float`, defaults to 1.0): Divides the amateur's logits alone.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, vocab_size)`: float32 scores in nats, `-inf` where excluded and
        never NaN. A log-probability of the amateur below -65504 counts as that.

    Raises:
        ValueError: If the streams differ in shape, or a number is out of its range.

    Source: CM3Leon (arXiv 2309.02591), Eq. 3; the amateur's temperature from contrastive decoding (arXiv 2210.15097).
    Differs: the paper prints no `k` or `alpha`, so neither has a default.

    Example:
        >>> cond = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> uncond = torch.tensor([[0.8, 0.1, 0.1]]).log()
        >>> contrastive_top_k(cond, uncond, k=2, alpha=0.5).exp()
        tensor([[0.7500, 3.0000, 0.0000]])

    """
    if cond_logits.shape != uncond_logits.shape:
        raise ValueError(
            f"`cond_logits` has shape {tuple(cond_logits.shape)} and `uncond_logits` {tuple(uncond_logits.shape)}; "
            "both must be alike."
        )
    if not 1 <= k <= cond_logits.shape[-1]:
        raise ValueError(f"`k`={k} must lie between 1 and the vocabulary's {cond_logits.shape[-1]}.")
    check_contrastive(k, alpha, amateur_temperature)
    cond = temper(cond_logits, 1.0).log_softmax(-1)
    # What the amateur holds impossible stays finite, so that it can be drawn from.
    uncond = temper(uncond_logits.float().clamp(min=FLOAT.min), amateur_temperature).log_softmax(-1)
    uncond = uncond.clamp(min=-SCORE_LIMIT)
    highest = cond.topk(k, dim=-1).values
    bar = highest.masked_fill(highest == -torch.inf, torch.inf).amin(-1, keepdim=True)
    is_plausible = cond > -torch.inf
    if alpha > 0:
        is_plausible = is_plausible & (cond >= bar + math.log(alpha))
    return (cond - uncond).masked_fill(~is_plausible, -torch.inf)


def check_contrastive(k: int, alpha: float, amateur_temperature: float, prefix: str = "") -> None:
    """Refuses settings of contrastive decoding that no vocabulary can make right.

    Raises:
        ValueError: Naming the number and its range.
    """
    if k < 1:
        raise ValueError(f"`{prefix}k`={k} must be at least 1.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"`{prefix}alpha`={alpha} must lie in [0, 1].")
    if not 0 < amateur_temperature < math.inf:
        raise ValueError(f"`amateur_temperature`={amateur_temperature} must be above 0, and finite.")


def guide_logits(streams: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    """Moves from the last stream towards the first, by each scale between two neighbours.

    Two streams give `u + s * (c - u)`, three give `u + s_image * (i - u) + s_text * (c - i)`.

    Args:
        streams (`torch.FloatTensor` of shape `(num_streams, batch_size, vocab_size)`):
            Logits, the fully conditional stream first and the unconditional one last. `-inf` in the first excludes;
            in another it counts as -65504, as every logit beyond +-65504 counts as that.
        scales (`Sequence[float]`): One fewer than streams; `scales[j]` stands between stream `j` and `j + 1`.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, vocab_size)`: in float32, never NaN; with all scales 1 the first
        stream, bit for bit.

    Source: CM3Leon (arXiv 2309.02591), Eq. 2; three streams as in InstructPix2Pix (arXiv 2211.09800), Eq. 3.
    """
    streams = streams.float()
    if all(scale == 1 for scale in scales):
        return streams[0]
    bounded = streams.clamp(-SCORE_LIMIT, SCORE_LIMIT)
    guided = bounded[-1]
    for scale, upper, lower in zip(scales, bounded[:-1], bounded[1:], strict=True):
        guided = (guided + float(scale) * (upper - lower)).clamp(FLOAT.min, FLOAT.max)
    return guided.masked_fill(streams[0] == -torch.inf, -torch.inf)


@dataclass(frozen=True)
class ImageSpan:
    """Where images may stand in a sequence of ids, and how long they are.

    Args:
        first_image_token_id (`int`): Id of the first image code; the others follow without a gap.
        image_vocab_size (`int`): Number of codes.
        tokens_per_image (`int`): Codes of an image.
        opening_token_ids (`tuple[int, ...]`): Tokens that an image may follow.
        closing_token_ids (`tuple[int, ...]`): Tokens that may follow an image.
        always_opens (`bool`, defaults to `False`): Whether an image follows every opening token, and nothing else.
    """

    first_image_token_id: int
    image_vocab_size: int
    tokens_per_image: int
    opening_token_ids: tuple[int, ...]
    closing_token_ids: tuple[int, ...]
    always_opens: bool = False

    def is_code(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Marks image codes."""
        return (token_ids >= self.first_image_token_id) & (
            token_ids < self.first_image_token_id + self.image_vocab_size
        )


def is_one_of(token_ids: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """Marks the ids that are among a few `values`."""
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for value in values:
        found = found | (token_ids == value)
    return found


class ImageSpanLogitsProcessor(LogitsProcessor):
    """Lets images stand where they may, with exactly as many codes as they have; elsewhere it forbids codes.

    Allowed tokens keep their scores, bit for bit. A begun image goes on until it is full, a full one is closed. Works
    on the scores of several streams at once. It reads the ids alone and keeps no state.

    Args:
        span ([`ImageSpan`]): Ids and length of images.
        max_length (`int`, *optional*): Length that sequences end at: no image opens that would not be closed by then.
    """

    def __init__(self, span: ImageSpan, max_length: int | None = None) -> None:
        self.span = span
        self.max_length = max_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbids what must not come next in `scores` of shape `(num_streams * batch_size, vocab_size)`."""
        span, last = self.span, input_ids[:, -1]
        recent = input_ids[:, -span.tokens_per_image - 1 :]
        index = torch.arange(1, recent.shape[1] + 1, device=recent.device)
        # Codes at the end of each row: as many as stand behind its last token that is none.
        count = recent.shape[1] - index.masked_fill(span.is_code(recent), 0).amax(-1)
        opens = is_one_of(last, span.opening_token_ids)
        goes_on = (count > 0) & (count < span.tokens_per_image)
        if span.always_opens:
            goes_on = goes_on | opens
        is_full = count >= span.tokens_per_image

        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        is_code, closes = span.is_code(vocabulary), is_one_of(vocabulary, span.closing_token_ids)
        is_text, may_open = ~is_code, opens
        if self.max_length is not None:
            room = self.max_length - input_ids.shape[1] - span.tokens_per_image - 1
            if room < 0:
                may_open = torch.zeros_like(opens)
            if span.always_opens and room < 1:
                is_text = is_text & ~is_one_of(vocabulary, span.opening_token_ids)
        elsewhere = is_text | (is_code & may_open[:, None])
        allowed = torch.where(goes_on[:, None], is_code, torch.where(is_full[:, None], closes, elsewhere))  # (B, V)
        streams = scores.unflatten(0, (-1, len(input_ids)))  # (S, B, V)
        return streams.masked_fill(~allowed, -torch.inf).flatten(0, 1)


class EndTurnLogitsProcessor(LogitsProcessor):
    """Ends an answer where another text would begin: behind `<break>` there is a picture or the end.

    Which of them is decided by what all codes, and all that is no code, weigh together.

    Args:
        span ([`ImageSpan`]): Ids of images, and what opens them.
        end_token_id (`int`): What ends an answer.
        first (`int`): Longest sequence that a text may still follow, such as the picture that ends a prompt.
    """

    def __init__(self, span: ImageSpan, end_token_id: int, first: int) -> None:
        self.span, self.end_token_id, self.first = span, end_token_id, first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbids text in `scores` of shape `(batch_size, vocab_size)` where a part has been opened."""
        if input_ids.shape[1] <= self.first:
            return scores
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        is_code, is_end = self.span.is_code(vocabulary), vocabulary == self.end_token_id
        weights = [scores.masked_fill(~kind, -torch.inf).logsumexp(-1) for kind in (is_code, ~is_code)]
        draws = (weights[0] > weights[1])[:, None]
        opened = is_one_of(input_ids[:, -1], self.span.opening_token_ids)[:, None]
        scores = scores.masked_fill(opened & ~is_end & ~(is_code & draws), -torch.inf)
        # The only one left; it may have been forbidden, or out of reach, by itself.
        return torch.where(opened & is_end & ~draws, torch.zeros_like(scores), scores)


class ForbidTokensLogitsProcessor(LogitsProcessor):
    """Forbids ranges of ids, but for some exceptions.

    Args:
        ranges (`Sequence[range]`): What is forbidden.
        exceptions (`Sequence[int]`, defaults to `()`): What of it is not.
    """

    def __init__(self, ranges: Sequence[range], exceptions: Sequence[int] = ()) -> None:
        self.ranges = tuple(ranges)
        self.exceptions = tuple(exceptions)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbids them in every row."""
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        forbidden = torch.zeros_like(vocabulary, dtype=torch.bool)
        for ids in self.ranges:
            forbidden = forbidden | ((vocabulary >= ids.start) & (vocabulary < ids.stop))
        return scores.masked_fill(forbidden & ~is_one_of(vocabulary, self.exceptions), -torch.inf)


class CodesLogitsProcessor(LogitsProcessor):
    """Leaves image codes alone possible, and shows other processors the codes' scores only.

    Inside, index `c` is code `c`; whatever ranks, folds or draws there does so among codes, at the cost of the
    codebook instead of the whole vocabulary. What it leaves is one row of scores per sequence again.

    Args:
        span ([`ImageSpan`]): Ids of the codes.
        processors (`LogitsProcessorList`): What to do with the codes' scores, in order.
    """

    def __init__(self, span: ImageSpan, processors: LogitsProcessorList) -> None:
        self.span = span
        self.processors = processors
        self.is_sound: torch.Tensor | None = None  # asked for at the end only: no token waits for the device

    def refuse_unsound(self) -> None:
        """Refuses to go on with codes that were drawn from nothing.

        Raises:
            FloatingPointError: If some row of the model's scores held NaN or infinity, or no code was possible in it.
        """
        if self.is_sound is not None and not bool(self.is_sound):
            raise FloatingPointError(
                "The model's scores of image codes hold NaN or infinity, or leave no code possible. Use bfloat16 or "
                "float32 if the model runs in float16; else its weights are broken."
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Turns `scores` of shape `(num_streams * batch_size, vocab_size)` into `(batch_size, vocab_size)`."""
        first = self.span.first_image_token_id
        stop = first + self.span.image_vocab_size
        is_sound = scores[:, first:stop].amax(-1).isfinite().all()
        self.is_sound = is_sound if self.is_sound is None else self.is_sound & is_sound
        folded = self.processors(input_ids, scores[:, first:stop])
        whole = scores.new_full((len(folded), scores.shape[-1]), -torch.inf)
        whole[:, first:stop] = folded
        return whole


class GivenTokensLogitsProcessor(LogitsProcessor):
    """Puts given tokens at given places of the answer; the others stay free.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch_size, answer_length)`): -1 where the model chooses.
        prompt_length (`int`): Length of the prompts, padding included.
    """

    def __init__(self, token_ids: torch.Tensor, prompt_length: int) -> None:
        self.token_ids = token_ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves only the given token where one is given, in `scores` of `(num_streams * batch_size, vocab_size)`."""
        step = input_ids.shape[1] - self.prompt_length
        if step >= self.token_ids.shape[1]:
            return scores
        given = self.token_ids[:, step, None]  # (B, 1)
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        excluded = (given >= 0) & (vocabulary != given)
        return scores.unflatten(0, (-1, len(given))).masked_fill(excluded, -torch.inf).flatten(0, 1)


class FoldStreamsLogitsProcessor(LogitsProcessor):
    """Turns the scores of several streams into one row of scores for each row of ids.

    The streams of a batch stand one below the other, the conditional rows first. This processor comes before all that
    expect one row of scores per sequence, and may come behind an [`ImageSpanLogitsProcessor`].

    Args:
        scales (`Sequence[float]`): Guidance between each two streams, see `guide_logits`.
        contrastive (`dict`, *optional*):
            `k`, `alpha` and `amateur_temperature` of `contrastive_top_k`, the first stream against the last.
        contrastive_rows (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
            Rows that are scored so; the others are guided. Defaults to all where `contrastive` is given.
    """

    def __init__(
        self,
        scales: Sequence[float],
        contrastive: dict[str, float] | None = None,
        contrastive_rows: torch.Tensor | None = None,
    ) -> None:
        self.scales = tuple(scales)
        self.contrastive = contrastive
        self.contrastive_rows = contrastive_rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Folds `scores` of shape `(num_streams * batch_size, vocab_size)` into `(batch_size, vocab_size)`."""
        streams = scores.unflatten(0, (len(self.scales) + 1, len(input_ids)))
        if self.contrastive is None:
            return guide_logits(streams, self.scales)
        contrasted = contrastive_top_k(streams[0], streams[-1], **self.contrastive)
        if self.contrastive_rows is None:
            return contrasted
        return torch.where(self.contrastive_rows[:, None], contrasted, guide_logits(streams, self.scales))


class SomeRowsLogitsProcessor(LogitsProcessor):
    """Applies a processor to some rows of a batch only.

    Args:
        processor (`LogitsProcessor`): Any that treats each row for itself.
        rows (`torch.BoolTensor` of shape `(batch_size,)`): Where it applies.
    """

    def __init__(self, processor: LogitsProcessor, rows: torch.Tensor) -> None:
        self.processor = processor
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the processed scores of the chosen rows."""
        return torch.where(self.rows[:, None], self.processor(input_ids, scores), scores)


class TemperLogitsProcessor(LogitsProcessor):
    """Divides scores by a temperature, see `temper`; the library's own warper overflows where it is low.

    Args:
        temperature (`float`): Above 0, and finite.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Divides every row."""
        return temper(scores, self.temperature)


class DrawTokenLogitsProcessor(LogitsProcessor):
    """Draws the next token of each row from noise that was drawn before, and leaves it alone possible.

    Comes last. Each row has noise of its own, so what it draws does not depend on the rows beside it; and since the
    drawn token is the only one left, greedy and sampling decoding both take it.

    Args:
        noise (`torch.FloatTensor` of shape `(batch_size, answer_length)`): Uniform in [0, 1), one number per token.
        prompt_length (`int`): Length of the prompts, padding included.
    """

    def __init__(self, noise: torch.Tensor, prompt_length: int) -> None:
        self.noise = noise
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Inverts the cumulative distribution of each row at its noise."""
        noise = self.noise[:, input_ids.shape[1] - self.prompt_length, None]
        probabilities = scores.softmax(-1)
        # Impossible tokens are never reached, whatever the rounding of the sums.
        reached = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)
        drawn = (reached > noise * reached.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


@dataclass(frozen=True)
class CodeSampling:
    """How image codes are chosen from the model's scores.

    Args:
        guidance_scale (`float`, defaults to 1.0): How closely to follow the text; 1 is off.
        image_guidance_scale (`float`, defaults to 1.0): How closely to follow a picture that was given; 1 is off.
        do_sample (`bool`, defaults to `True`): Whether to draw codes, or to take the best.
        temperature (`float`, defaults to 1.0): Divides the scores.
        top_k (`int`, *optional*): Draws from that many best codes only.
        top_p (`float`, defaults to 1.0): Draws from the fewest best codes that have this probability together.
        decoding (`str`, defaults to `"top_p"`):
            `"top_p"`: guidance and the nucleus. `"contrastive"`: CD-K, without either. `"mixed"`: of the candidates
            of each prompt the first half by the one (the middle one too), the second half by the other.
        contrastive_k (`int`, *optional*): See `contrastive_top_k`; needed where it is used.
        contrastive_alpha (`float`, *optional*): Likewise.
        amateur_temperature (`float`, defaults to 1.0): Likewise.

    Raises:
        ValueError: If a number is out of its range, or one is missing.

    Source: CM3Leon (arXiv 2309.02591), section 3.2. Differs: the paper prints no values.
    """

    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    decoding: str = "top_p"
    contrastive_k: int | None = None
    contrastive_alpha: float | None = None
    amateur_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind, wanted = (Integral, "a whole number") if name.endswith("_k") else (Real, "a number")
            if value is not None and name not in ("decoding", "do_sample") and not isinstance(value, kind):
                raise ValueError(f"`{name}`={value!r} must be {wanted}.")
        largest = torch.finfo(torch.float32).max  # an int may be beyond every float
        for name in ("guidance_scale", "image_guidance_scale"):
            if not 1 <= (value := self.__dict__[name]) <= largest:
                raise ValueError(f"`{name}`={value} is below 1 or not finite. Use 1 to switch guidance off.")
        if not 0 < self.temperature <= largest:
            raise ValueError(
                f"`temperature`={self.temperature} must be above 0, and finite; `do_sample=False` takes the best."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k`={self.top_k} must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p`={self.top_p} must lie above 0 and up to 1.")
        if self.decoding not in DECODINGS:
            raise ValueError(f"`decoding`={self.decoding!r} is not one of {DECODINGS}.")
        if self.decoding == "top_p":
            for name in ("contrastive_k", "contrastive_alpha"):
                if (value := self.__dict__[name]) is not None:
                    raise ValueError(f"`{name}`={value} has no effect with `decoding`='top_p'. Set `decoding` too.")
            return
        if self.contrastive_k is None or self.contrastive_alpha is None:
            raise ValueError(f"`decoding`={self.decoding!r} needs `contrastive_k` and `contrastive_alpha`.")
        if self.image_guidance_scale != 1:
            raise ValueError(
                f"`image_guidance_scale`={self.image_guidance_scale} must be 1 with `decoding`={self.decoding!r}, "
                "which contrasts two streams."
            )
        check_contrastive(self.contrastive_k, self.contrastive_alpha, self.amateur_temperature, "contrastive_")

    @property
    def scales(self) -> tuple[float, ...]:
        """Guidance between each two streams; none where one stream suffices."""
        if self.image_guidance_scale != 1:
            return self.guidance_scale, self.image_guidance_scale
        return () if self.guidance_scale == 1 and self.decoding == "top_p" else (self.guidance_scale,)

    def processors(self, num_rows: int, num_candidates: int, device: torch.device) -> LogitsProcessorList:
        """Lists what happens to the scores of the codes, in order, but for the draw itself.

        Args:
            num_rows (`int`): Rows of ids: prompts times candidates, those of one prompt side by side.
            num_candidates (`int`): Candidates of each prompt.
            device (`torch.device`): Where the scores are.

        Returns:
            `LogitsProcessorList`: for a [`CodesLogitsProcessor`].
        """
        contrastive, contrastive_rows = None, None
        if self.decoding != "top_p":
            contrastive = {
                "k": self.contrastive_k,
                "alpha": self.contrastive_alpha,
                "amateur_temperature": self.amateur_temperature,
            }
        if self.decoding == "mixed":
            candidate = torch.arange(num_rows, device=device) % num_candidates
            contrastive_rows = candidate >= (num_candidates + 1) // 2
        processors = LogitsProcessorList()
        if self.scales:
            processors.append(FoldStreamsLogitsProcessor(self.scales, contrastive, contrastive_rows))
        if self.temperature != 1:
            processors.append(TemperLogitsProcessor(self.temperature))
        if self.decoding == "contrastive":
            return processors
        warpers: list[LogitsProcessor] = []
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        if contrastive_rows is not None:
            warpers = [SomeRowsLogitsProcessor(warper, ~contrastive_rows) for warper in warpers]
        return LogitsProcessorList([*processors, *warpers])


__all__ = [
    "CodeSampling",
    "CodesLogitsProcessor",
    "DrawTokenLogitsProcessor",
    "EndTurnLogitsProcessor",
    "FoldStreamsLogitsProcessor",
    "ForbidTokensLogitsProcessor",
    "GivenTokensLogitsProcessor",
    "ImageSpan",
    "ImageSpanLogitsProcessor",
    "SomeRowsLogitsProcessor",
    "TemperLogitsProcessor",
    "contrastive_top_k",
    "guide_logits",
    "temper",
]
