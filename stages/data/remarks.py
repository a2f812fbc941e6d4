"""What a user should know about prompts that can be used: repeats, leaks, and how few there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.data.prompts import Prompt
from stages.runtime.config import Config
from stages.runtime.split import pool_size

FEW_HELDOUT = 50
TOLERATED_REPEATS = 0.01  # share of the prompts


def about_prompts(config: Config, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> Iterator[str]:
    """Sentences about the prompts to train on and those held out; either may be empty."""
    repeated = _num_repeats(prompts)
    if repeated > TOLERATED_REPEATS * len(prompts):
        yield (
            f"{repeated} of {len(prompts)} prompts ({repeated / len(prompts):.1%}) repeat another one of the"
            " data; remove them there unless they should count more"
        )
    if prompts:
        yield from _about_reuse(config, len(prompts))
    known = {prompt.prompt_id for prompt in prompts}
    leaked = sum(prompt.prompt_id in known for prompt in heldout)
    if leaked:
        yield (
            f"warning: {leaked} of {len(heldout)} held-out prompts are also trained on, so their figures do"
            " not show what new prompts would; remove them from dataset or eval_dataset"
        )
    if heldout and len(heldout) < FEW_HELDOUT and config.eval.answer_checker:
        yield (
            f"{len(heldout)} held-out prompt{'s are' if len(heldout) > 1 else ' is'} few: an accuracy on them"
            f" has a standard error of up to {50 / len(heldout) ** 0.5:.0f} points"
        )


def _num_repeats(prompts: Sequence[Prompt]) -> int:
    """Records whose prompt another one has. A data set that is mixed in twice is not counted."""
    records = {id(prompt): prompt.prompt_id for prompt in prompts}.values()
    return len(records) - len({*records})


def _about_reuse(config: Config, num_prompts: int) -> Iterator[str]:
    """Whether a refresh takes a prompt more than once."""
    group = config.rollout.group_size
    needed = pool_size(config, 0) // group
    if needed > num_prompts:
        each = f" of {group} completions each" if group > 1 else ""
        yield (
            f"there are {num_prompts} prompts for the {needed} that a refresh takes{each}: each is used"
            f" {needed / num_prompts:.1f} times"
        )
