"""Check that caches can be trained on, together and with the configured loss, or evaluated on."""

from __future__ import annotations

import cache
from stages.data.signals import KINDS
from stages.loops import setup
from stages.loops.setup import Vocabulary
from stages.runtime.config import Config
from stages.runtime.errors import UserError


def check_trainable(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse caches that are missing, or that cannot be trained on together or with this loss.

    The run's own cache may be written later; it will use this vocabulary.
    """
    if cache.exists(config.cache_root):
        own = cache.open(config.cache_root).fingerprint
        check_loss(config, config.cache_root, own)
    else:
        own = setup.unscored_fingerprint(config, vocabulary)
    for root in config.run.extra_caches:
        if not cache.exists(root):
            raise UserError(f"extra_caches: there is no teacher cache at {root}.")
        other = cache.open(root).fingerprint
        for name in ("tokenizer", "vocab_size"):
            if other.must_match[name] != own.must_match[name]:
                raise UserError(
                    f"extra_caches: the {name} of {root} is {other.must_match[name]}, that of"
                    f" {config.cache_root} is {own.must_match[name]}; only caches of one tokenizer and"
                    " vocabulary cut can be mixed."
                )
        check_loss(config, root, other)


def check_teacher_text(config: Config, root: str, vocabulary: Vocabulary) -> None:
    """Refuse an `eval_teacher_text` cache on which exact KLs cannot be measured."""
    kind = cache.open(root).fingerprint.must_match["signal"]["kind"]
    if kind != "hidden":
        raise UserError(
            f"eval_teacher_text {root} holds {kind} rows; exact KLs need a cache of signal hidden."
        )
    if setup.vocabulary_of(config, root).size != vocabulary.size:
        raise UserError(
            f"eval_teacher_text {root} has another vocabulary cut than this run ({vocabulary.size})."
        )
    if not len(cache.open(root)):
        raise UserError(
            f"eval_teacher_text {root} holds no rows; write teacher completions to it, or leave it empty."
        )


def check_loss(config: Config, root: str, stored: cache.Fingerprint) -> None:
    """Refuse a loss that the rows of the cache at `root`, from any run, do not support."""
    signal, recorded = stored.must_match["signal"], stored.recorded
    kind = KINDS.get(signal["kind"])
    if kind is not None and not kind.is_whole and config.loss.temperature != signal["temperature"]:
        raise UserError(
            f"{root} holds {signal['kind']} rows at temperature {signal['temperature']}, the loss is at"
            f" {config.loss.temperature}; only hidden and full rows serve other temperatures."
        )
    if config.loss.rkl == "mc" and (
        recorded.get("sample_top_p", 1) < 1 or recorded.get("sample_top_k", 0) > 0
    ):
        raise UserError(
            f"{root} was sampled with top_p {recorded.get('sample_top_p')} and top_k"
            f" {recorded.get('sample_top_k')}: rkl: mc would be biased on these rows; use rkl: exact."
        )
