"""The teacher objects that the loss takes, from stored signals of every kind."""

import numpy as np
import pytest
import torch

import cache
from dualkl import HiddenTeacher, LogitsTeacher, TopKTeacher
from stages.data.signals import dual_kl_head, teacher_of
from stages.runtime.errors import UserError
from tests.support.training_rows import V, bf16_bits, make_record, topk

CPU = torch.device("cpu")


def test_top_k_rows_of_unequal_width_are_widened_with_empty_slots() -> None:
    records = [make_record(0, signal=topk(4, 3)), make_record(1, completion=2, signal=topk(2, 5, seed=1))]
    teacher = teacher_of(records, None, V)
    assert isinstance(teacher, TopKTeacher)
    assert teacher.ids.shape == teacher.logprobs.shape == (6, 5)
    assert (teacher.ids[:4, 3:] == -1).all()
    assert teacher.logprobs[:4, 3:].isneginf().all()
    for rows, record in ((slice(0, 4), records[0]), (slice(4, 6), records[1])):
        k = record.signal.ids.shape[1]
        assert np.array_equal(teacher.ids[rows, :k].numpy(), record.signal.ids)
        assert np.array_equal(teacher.logprobs[rows, :k].numpy(), record.signal.logprobs)
        assert np.array_equal(teacher.log_tail_mass[rows].numpy(), record.signal.log_tail_mass)


def test_top_k_values_are_checked_on_the_host_before_they_leave_it() -> None:
    signal = topk(4, 3)
    signal.ids[2, 1] = signal.ids[2, 0]
    with pytest.raises(ValueError, match="keeps the same id twice"):
        teacher_of([make_record(0, signal=signal)], None, V)


def test_bf16_hidden_states_keep_their_bits() -> None:
    states = torch.randn(4, 6).to(torch.bfloat16)
    head = dual_kl_head(
        cache.TeacherHead(bf16_bits(torch.randn(V, 6)), "bfloat16", scale=0.5, softcap=30.0), CPU
    )
    teacher = teacher_of([make_record(0, signal=cache.Hidden(bf16_bits(states), "bfloat16"))], head, V)
    assert isinstance(teacher, HiddenTeacher)
    assert torch.equal(teacher.hidden, states)
    assert teacher.lm_head is head
    assert head is not None
    assert (head.weight.dtype, head.scale, head.softcap) == (torch.bfloat16, 0.5, 30.0)


def test_a_head_without_softcap_or_bias_has_none() -> None:
    head = dual_kl_head(cache.TeacherHead(np.ones((V, 6), np.float32), "float32"), CPU)
    assert head is not None
    assert head.softcap is None
    assert head.bias is None
    assert dual_kl_head(None, CPU) is None


def test_hidden_states_without_a_head_are_a_sentence() -> None:
    record = make_record(0, signal=cache.Hidden(np.ones((4, 6), np.float32), "float32"))
    with pytest.raises(UserError, match="no teacher head"):
        teacher_of([record], None, V)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_logits_reach_the_loss_as_float32(dtype: str) -> None:
    logits = torch.randn(4, V).to(torch.bfloat16).float()
    stored = bf16_bits(logits) if dtype == "bfloat16" else logits.numpy()
    teacher = teacher_of([make_record(0, signal=cache.Full(stored, dtype))], None, V)
    assert isinstance(teacher, LogitsTeacher)
    assert teacher.logits.dtype == torch.float32
    assert torch.equal(teacher.logits, logits)
