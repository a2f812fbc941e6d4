"""The codec keeps every bit of a signal; a top-k signal is normalised over its kept ids and tail."""

import time

import numpy as np
import pytest

import cache
from cache import codec
from cache.planes import pack
from tests.support.cache_samples import KEPT, VOCAB, bfloat16, log_softmax, signal_of, topk
from tests.support.plain_reader import read_signal
from tests.support.thinning import leading


@pytest.mark.parametrize("kind", ["topk", "nucleus", "hidden", "full"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_signal_comes_back_as_it_was(kind, num_tokens):
    rng = np.random.default_rng(3)
    logprobs = log_softmax(rng.normal(0, 3, (num_tokens, VOCAB)))
    signal = signal_of(kind, topk(logprobs, ragged=kind == "nucleus"), logprobs, rng)
    packed = codec.encode(signal)
    decoded = codec.decode(packed)
    assert type(decoded) is type(signal)
    if kind in ("topk", "nucleus"):
        np.testing.assert_array_equal(decoded.ids, signal.ids)
        np.testing.assert_allclose(decoded.logprobs, signal.logprobs, atol=1 / 256)
        np.testing.assert_allclose(decoded.log_tail_mass, signal.log_tail_mass, rtol=2**-16)
        assert_reads_as(decoded, read_signal(packed))
    else:
        (name,) = vars(signal).keys() - {"dtype"}
        np.testing.assert_array_equal(getattr(decoded, name), getattr(signal, name))
        assert decoded.dtype == signal.dtype
        assert read_signal(packed)["bytes"] == getattr(signal, name).tobytes()


def assert_reads_as(decoded, plain):
    """What FORMAT.md makes of the bytes is what `decode` does."""
    assert [[i for i in row if i >= 0] for row in decoded.ids.tolist()] == plain["ids"]
    for own, values in zip(decoded.logprobs, plain["logprobs"]):
        np.testing.assert_allclose(own[: len(values)], values, atol=1e-5)
    np.testing.assert_allclose(decoded.log_tail_mass, plain["log_tail_mass"], atol=1e-5)


def qwen_like(num_tokens, k, mass=None, vocab_size=151_936):
    """A peaked low-rank teacher over a Qwen-sized vocabulary; with `mass`, the smallest set of at least 4 ids
    that has it.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.25, (num_tokens, 16)) @ rng.normal(size=(16, vocab_size)) - np.log(
        1 + np.arange(vocab_size)
    )
    for row in logits:
        row[rng.integers(0, vocab_size, 8)] += rng.exponential(6, 8)
    logprobs = log_softmax(logits)
    ids = np.argpartition(-logprobs, k, axis=1)[:, :k]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logprobs, ids, 1), axis=1), 1)
    kept = np.take_along_axis(logprobs, ids, 1)
    if mass:
        before = np.cumsum(np.exp(kept), 1) - np.exp(kept)
        empty = (before >= mass) & (np.arange(k) >= 4)
        ids, kept = np.where(empty, -1, ids), np.where(empty, -np.inf, kept)
    return cache.TopK(ids, kept, np.log(np.maximum(1 - np.exp(kept).sum(1), 1e-12)))


def divergence(exact, rounded):
    """KL(exact || rounded) of each position over kept ids and tail, nats."""
    kept = exact.ids >= 0
    p, gap = np.exp(exact.logprobs.astype(float)), np.zeros(kept.shape)
    gap[kept] = exact.logprobs[kept].astype(float) - rounded.logprobs[kept]
    tail = exact.log_tail_mass.astype(float)
    return (p * gap).sum(1) + np.exp(tail) * (tail - rounded.log_tail_mass)


@pytest.mark.parametrize("mass", leading(1, [0.99, None]))
def test_rows_of_a_large_vocabulary_are_small_and_true(mass):
    signal = qwen_like(256, 64, mass)
    packed = codec.encode(signal)
    decoded = codec.decode(packed)
    np.testing.assert_array_equal(decoded.ids, signal.ids)
    assert len(packed) <= 2.6 * (signal.ids >= 0).sum() + 5 * len(signal.ids)
    assert divergence(signal, decoded).mean() <= 1e-6
    total = np.exp(decoded.logprobs.astype(float)).sum(1) + np.exp(decoded.log_tail_mass.astype(float))
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (decoded.logprobs[:, 1:] <= decoded.logprobs[:, :-1]).all()


def test_ids_without_any_pattern_take_at_most_three_bytes():
    likely = qwen_like(64, 64)
    ids = np.argsort(np.random.default_rng(1).random((*likely.ids.shape[:1], 10000)), axis=1)[:, :64] * 15 + 7
    signal = cache.TopK(ids, likely.logprobs, likely.log_tail_mass)
    packed = codec.encode(signal)
    assert len(packed) <= 64 * 3 * 64
    np.testing.assert_array_equal(codec.decode(packed).ids, ids)


@pytest.mark.parametrize(
    "largest", [0, 1, 2, 15, 16, 255, 256, 300, 4095, 65_535, 65_536, 151_935, 2**24, 2**31 - 1]
)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_ids_of_any_vocabulary_are_exact(largest, num_tokens):
    ids = np.full((num_tokens, 3), -1)
    ids[:, 0] = largest
    ids[0, 1] = largest // 2 if largest else -1
    logprobs = np.where(ids >= 0, np.log(0.3), -np.inf)
    signal = cache.TopK(ids, logprobs, np.log1p(-np.exp(logprobs).sum(1)))
    packed = codec.encode(signal)
    np.testing.assert_array_equal(codec.decode(packed).ids, ids)
    assert read_signal(packed)["ids"] == [[i for i in row if i >= 0] for row in ids.tolist()]


def normalised(ids, logprobs, tail):
    total = np.log(np.exp(logprobs).sum(1) + np.exp(tail))
    return cache.TopK(ids, logprobs - total[:, None], tail - total)


def test_large_gaps_are_kept_whatever_their_size():
    gaps = np.array([[0, 9.5, 9.5, 60, 1e4, 3e6], [0, 5000, 5000.5, 5001, 8e5, 7e6], [0, 0, 30, 31, 32, 33]])
    signal = normalised(np.arange(18).reshape(3, 6), -gaps, np.array([-40.0, -1e-3, -np.inf]))
    decoded = codec.decode(codec.encode(signal))
    actual = decoded.logprobs[:, :1].astype(float) - decoded.logprobs
    np.testing.assert_allclose(actual, gaps, atol=1 / 512 + 1e-6, rtol=1e-7)
    np.testing.assert_allclose(decoded.log_tail_mass, signal.log_tail_mass, rtol=2**-16)
    assert_reads_as(
        cache.TopK(decoded.ids, decoded.logprobs, decoded.log_tail_mass), read_signal(codec.encode(signal))
    )


@pytest.mark.parametrize("tail", [-1e-7, -1e-3, -0.6931, -0.6932, -1.0, -20.0, -90.0, -1e4, -np.inf])
def test_both_masses_stay_precise_however_unequal(tail):
    kept = np.log(-np.expm1(tail)) if tail > -700 else 0.0
    signal = cache.TopK(
        np.array([[5, 3]]), np.array([[kept + np.log(0.7), kept + np.log(0.3)]]), np.array([tail])
    )
    decoded = codec.decode(codec.encode(signal))
    np.testing.assert_allclose(decoded.log_tail_mass, [tail], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(
        np.logaddexp(*decoded.logprobs[0]), kept, rtol=2e-5 if tail > -1 else 1e-3, atol=1e-6
    )


def test_logits_take_at_most_three_quarters_of_their_bytes():
    rng = np.random.default_rng(0)
    logits = bfloat16(rng.normal(size=(8, 32)) @ rng.normal(0, 0.5, (32, 20_000)))
    assert len(codec.encode(cache.Full(logits, "bfloat16"))) <= 0.75 * logits.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_states_keep_every_bit_in_each_dtype(dtype):
    values = np.random.default_rng(0).normal(0, 100, (4, 9)).astype(np.float32)
    states = bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)
    decoded = codec.decode(codec.encode(cache.Hidden(states, dtype)))
    assert decoded.states.tobytes() == states.tobytes()
    np.testing.assert_allclose(cache.to_float32(decoded.states, dtype), values, rtol=1e-2)


def test_masses_are_normalised_over_kept_ids_and_tail_together():
    logprobs = np.log(np.array([[0.6, 0.2], [0.5, 0.25]], np.float32)) + np.float32(5e-5)
    tail = np.log(np.array([0.2, 0.25], np.float32)) + np.float32(5e-5)
    decoded = codec.decode(codec.encode(cache.TopK(np.array([[4, 1], [0, 2]]), logprobs, tail)))
    mass = np.exp(decoded.logprobs.astype(float)).sum(1) + np.exp(decoded.log_tail_mass.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(decoded.log_tail_mass), [0.2, 0.25], atol=1e-5)
    np.testing.assert_allclose(decoded.logprobs, np.log([[0.6, 0.2], [0.5, 0.25]]), atol=1 / 256)


def test_empty_slots_and_a_missing_tail_stay_what_they_are():
    ids = np.array([[3, 1, -1], [2, -1, -1], [-1, -1, -1]])
    logprobs = np.log(
        np.array([[0.75, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]), where=ids >= 0, out=np.full((3, 3), -np.inf)
    )
    decoded = codec.decode(codec.encode(cache.TopK(ids, logprobs, np.array([-np.inf, np.log(0.5), 0.0]))))
    np.testing.assert_array_equal(decoded.ids, ids)
    assert np.isneginf(decoded.logprobs[ids < 0]).all()
    assert np.isneginf(decoded.log_tail_mass[0])
    assert decoded.log_tail_mass[2] == 0


def test_damaged_and_foreign_bytes_are_refused():
    packed = codec.encode(topk(log_softmax(np.random.default_rng(0).normal(size=(3, VOCAB)))))
    for damaged in (
        packed[:10],
        packed[:-3],
        packed[:20] + b"\0\0\0" + packed[23:],
        packed[:1] + b"\x09" + packed[2:],
    ):
        with pytest.raises(cache.CacheError, match="cannot be decoded"):
            codec.decode(damaged)
    with pytest.raises(cache.CacheError, match=r"codec version 9, this program reads version 2"):
        codec.decode(b"\x09" + packed[1:])


def test_a_mass_that_is_a_signalling_nan_is_refused_without_a_warning(recwarn):
    packed = codec.encode(topk(log_softmax(np.random.default_rng(0).normal(size=(1, VOCAB)))))
    planes, position = [], codec.HEADER.size
    while position < len(packed):
        size = 4 + int.from_bytes(packed[position : position + 4], "little")
        planes.append(packed[position : position + size])
        position += size
    # after one plane of counts and two of ids
    planes[3:6] = [pack(np.array([byte], np.uint8)) for byte in (0x01, 0x80, 0x7F)]
    with pytest.raises(cache.CacheError, match="not a number"):
        codec.decode(packed[: codec.HEADER.size] + b"".join(planes))
    assert [str(warning.message) for warning in recwarn] == []


def test_a_row_of_512_tokens_and_64_ids_is_packed_in_milliseconds():
    signal = qwen_like(512, 64, vocab_size=20_000)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        codec.decode(codec.encode(signal))
        seconds.append(time.perf_counter() - start)
    assert (
        min(seconds) < 0.05
    )  # 512 tokens at the targets of both directions take 0.0045 on a core of its own


def test_a_top_k_of_one_width_takes_any_integer_and_float_dtype():
    signal = cache.TopK(np.arange(KEPT, dtype=np.int64)[None], np.full((1, KEPT), -2.0), np.array([-1.0]))
    assert signal.ids.dtype == np.int32
    assert signal.logprobs.dtype == np.float32
    with pytest.raises(cache.CacheError, match=r"signal\.ids holds numbers that do not fit int32"):
        cache.TopK(np.array([[2**40]]), np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(cache.CacheError, match=r"signal\.ids is an array of float64; expected int32"):
        cache.TopK(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(
        cache.CacheError, match=r"signal\.log_tail_mass has shape \[1, 1\]; expected 1 dimension\."
    ):
        cache.TopK(np.zeros((1, 1), int), np.zeros((1, 1)), np.zeros((1, 1)))
    with pytest.raises(cache.CacheError, match=r"an array of float32 .* uint16, which holds bfloat16"):
        cache.Hidden(np.zeros((2, 2), np.float32), "bfloat16")


@pytest.mark.parametrize("kind", ["topk", "nucleus", "hidden", "full"])
def test_signals_decoded_together_are_those_decoded_alone(kind):
    """Of other lengths, widths and id bits too, and with gaps that two bytes do not hold."""
    rng = np.random.default_rng(4)
    signals = []
    for num_tokens, spread in ((5, 3), (1, 3), (7, 500), (3, 1), (4, 500)):
        logprobs = log_softmax(rng.normal(0, spread, (num_tokens, VOCAB)))
        with np.errstate(divide="ignore"):
            kept = topk(logprobs, ragged=kind == "nucleus" or num_tokens == 3)
        if num_tokens == 1 and kind in ("topk", "nucleus"):
            kept = cache.TopK(kept.ids % 4 - 4 * (kept.ids < 0), kept.logprobs, kept.log_tail_mass)
        signals.append(signal_of(kind, kept, logprobs, rng))
    packed, lengths = [codec.encode(signal) for signal in signals], [5, 1, 7, 3, 4]
    for together, alone in zip(codec.decode_together(packed, lengths), map(codec.decode, packed)):
        assert type(together) is type(alone)
        for name, value in vars(alone).items():
            np.testing.assert_array_equal(getattr(together, name), value)
    packed[2] = packed[2][:-1]
    with pytest.raises(cache.CacheError) as expected:
        codec.decode(packed[2], 7)
    with pytest.raises(cache.CacheError) as found:
        codec.decode_together(packed, lengths)
    assert str(found.value) == str(expected.value)
