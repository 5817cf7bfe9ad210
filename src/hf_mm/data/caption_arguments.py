"""The settings of the preparation of captioned pictures, as flat fields for a recipe's YAML.

Holds and checks values; does nothing with rows.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from .caption_text import BOILERPLATE_PATTERNS, FORM_WEIGHTS


@dataclass
class CaptionArguments:
    """What happens to captioned pictures before training. Every default is ours; the papers print no numbers."""

    boilerplate_patterns: list[str] = field(
        default_factory=lambda: list(BOILERPLATE_PATTERNS),
        metadata={"help": "Regular expressions, case ignored, of phrases to remove from all text. Empty: none."},
    )
    require_letters: bool = field(
        default=True, metadata={"help": "Drop rows whose text has no letter of any script, such as '12-34'."}
    )
    max_caption_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Drop rows whose text alone is longer; cut keywords and categories so that no form is longer. "
            "Needs a tokenizer. None: no limit."
        },
    )
    min_image_px: int = field(default=1, metadata={"help": "Drop pictures whose shorter side is below this many px."})
    max_aspect_ratio: float | None = field(
        default=None, metadata={"help": "Drop pictures whose longer side is more than this many times the shorter."}
    )
    people: Literal["keep", "exclude", "only"] = field(
        default="keep",
        metadata={
            "help": "Pictures of people, by the column has_people. Rows where it is null stay only with 'keep'."
        },
    )
    min_aesthetic_score: float | None = field(
        default=None, metadata={"help": "Drop rows whose aesthetic_score is lower or null. None: keep all."}
    )
    drop_duplicates: bool = field(
        default=True, metadata={"help": "Drop rows with the same pixels and the same words as an earlier row."}
    )
    near_duplicate_distance: int | None = field(
        default=None,
        metadata={
            "help": "Drop pictures whose difference hash (64 bits) is within this many bits of an earlier one's; 2 to "
            "4 is usual. None: off. Variants, such as one drawing in several colours, are near-duplicates too."
        },
    )
    near_duplicate_captions: Literal["same", "any"] = field(
        default="same",
        metadata={"help": "'same': near-duplicates are dropped only if their words are the same. 'any': always."},
    )
    max_unreadable_share: float = field(
        default=0.01,
        metadata={"help": "Stop with an error if a larger share of the opened images cannot be read, in [0, 1]."},
    )
    people_oversampling: float = field(
        default=1.0, metadata={"help": "How many times as often a row with people is drawn in training."}
    )
    high_aesthetic_score: float | None = field(
        default=None, metadata={"help": "Rows with at least this aesthetic_score are raised at the end of training."}
    )
    high_aesthetic_oversampling: float = field(
        default=1.0,
        metadata={"help": "How many times as often such rows are drawn in the last final_share of training."},
    )
    final_share: float = field(
        default=0.1, metadata={"help": "The last share of training, in [0, 1], in which the raised weights hold."}
    )
    description_weight: float = field(
        default=FORM_WEIGHTS["description"], metadata={"help": "Chance of the caption form: description alone."}
    )
    description_keywords_weight: float = field(
        default=FORM_WEIGHTS["description_keywords"], metadata={"help": "Chance of: description, all keywords."}
    )
    description_subset_weight: float = field(
        default=FORM_WEIGHTS["description_subset"],
        metadata={"help": "Chance of: description, shuffled some keywords."},
    )
    keywords_weight: float = field(
        default=FORM_WEIGHTS["keywords"], metadata={"help": "Chance of: shuffled some keywords alone."}
    )
    category_description_weight: float = field(
        default=FORM_WEIGHTS["category_description"], metadata={"help": "Chance of: a category, colon, description."}
    )

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        for name in ("max_unreadable_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}`={getattr(self, name)} must be in [0, 1].")
        for name in ("people_oversampling", "high_aesthetic_oversampling"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}`={getattr(self, name)} must be above 0. Use 1 to switch it off.")
        if self.high_aesthetic_score is not None and self.high_aesthetic_oversampling == 1:
            raise ValueError(
                f"`high_aesthetic_score`={self.high_aesthetic_score} raises nothing while "
                "`high_aesthetic_oversampling` is 1. Say how many times as often such rows are drawn, e.g. 3."
            )
        for name, weight in self.form_weights().items():
            if weight < 0:
                raise ValueError(f"`{name}_weight`={weight} must be at least 0.")
        if self.people not in ("keep", "exclude", "only"):
            raise ValueError(f"`people`={self.people!r} must be 'keep', 'exclude' or 'only'.")
        if self.near_duplicate_captions not in ("same", "any"):
            raise ValueError(f"`near_duplicate_captions`={self.near_duplicate_captions!r} must be 'same' or 'any'.")
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise ValueError(f"`max_aspect_ratio`={self.max_aspect_ratio} is longer over shorter side, at least 1.")
        self.compile_boilerplate()

    @property
    def is_weighted(self) -> bool:
        """Whether some rows are drawn more often than others."""
        return self.people_oversampling != 1 or self.high_aesthetic_oversampling != 1

    def compile_boilerplate(self) -> list[re.Pattern[str]]:
        """Compiles `boilerplate_patterns`."""
        try:
            return [re.compile(pattern, re.IGNORECASE) for pattern in self.boilerplate_patterns]
        except re.error as error:
            raise ValueError(
                f"`boilerplate_patterns`: {error.pattern!r} is no regular expression: {error}."
            ) from error

    def form_weights(self) -> dict[str, float]:
        """Returns the chances of the forms of caption as [`sample_caption`] takes them."""
        return {
            "description": self.description_weight,
            "description_keywords": self.description_keywords_weight,
            "description_subset": self.description_subset_weight,
            "keywords": self.keywords_weight,
            "category_description": self.category_description_weight,
        }

    def reasons(self) -> dict[str, str]:
        """Returns the steps in the order in which they look at a row, each with what it drops."""
        return {
            "people": f"people={self.people!r}",
            "low_aesthetic_score": f"aesthetic_score below min_aesthetic_score={self.min_aesthetic_score}, or null",
            "empty_caption": "no text, description or keywords left after the clean-up",
            "special_token": "text that spells a special token of the tokenizer",
            "no_letters": "text without a letter",
            "too_long": f"text longer than max_caption_tokens={self.max_caption_tokens}",
            "unreadable_image": "image missing, damaged, zero-sized or too large to be safe",
            "too_small": f"shorter side below min_image_px={self.min_image_px}",
            "aspect_ratio": f"longer over shorter side above max_aspect_ratio={self.max_aspect_ratio}",
            "duplicate": "same pixels and same words as an earlier row",
            "near_duplicate": f"hash within near_duplicate_distance={self.near_duplicate_distance} of an earlier row, "
            f"captions: {self.near_duplicate_captions}",
        }
