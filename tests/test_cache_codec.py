"""Signals keep every bit through the codec; a top-k signal comes back normalised over its kept ids and tail."""

import time

import numpy as np
import pytest

import cache
from cache import codec
from tests.cache_samples import KEPT, VOCAB, bfloat16, log_softmax, signal_of, topk


@pytest.mark.parametrize("kind", ["topk", "nucleus", "hidden", "full"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_signal_comes_back_as_it_was(kind, num_tokens):
    rng = np.random.default_rng(3)
    logprobs = log_softmax(rng.normal(0, 3, (num_tokens, VOCAB)))
    signal = signal_of(kind, topk(logprobs, ragged=kind == "nucleus"), logprobs, rng)
    decoded = codec.decode(codec.encode(signal))
    assert type(decoded) is type(signal)
    if kind in ("topk", "nucleus"):
        np.testing.assert_array_equal(decoded.ids, signal.ids)
        np.testing.assert_allclose(decoded.logprobs, signal.logprobs, atol=1e-6)
        np.testing.assert_allclose(decoded.log_tail_mass, signal.log_tail_mass, rtol=1e-5)
    else:
        (name,) = vars(signal).keys() - {"dtype"}
        np.testing.assert_array_equal(getattr(decoded, name), getattr(signal, name))
        assert decoded.dtype == signal.dtype


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
    np.testing.assert_allclose(mass, 1, atol=1e-7)
    np.testing.assert_allclose(decoded.logprobs, np.log([[0.6, 0.2], [0.5, 0.25]]), atol=1e-6)


def test_empty_slots_and_a_missing_tail_stay_what_they_are():
    ids = np.array([[3, 1, -1], [2, -1, -1], [-1, -1, -1]])
    logprobs = np.log(np.array([[0.75, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]), where=ids >= 0, out=np.full((3, 3), -np.inf))
    decoded = codec.decode(codec.encode(cache.TopK(ids, logprobs, np.array([-np.inf, np.log(0.5), 0.0]))))
    np.testing.assert_array_equal(decoded.ids, ids)
    assert np.isneginf(decoded.logprobs[ids < 0]).all()
    assert np.isneginf(decoded.log_tail_mass[0])
    assert decoded.log_tail_mass[2] == 0


def test_damaged_and_foreign_bytes_are_refused():
    packed = codec.encode(topk(log_softmax(np.random.default_rng(0).normal(size=(3, VOCAB)))))
    for damaged in (packed[:10], packed[:-3], packed[:20] + b"\0\0\0" + packed[23:], packed[:1] + b"\x09" + packed[2:]):
        with pytest.raises(cache.CacheError, match="does not decode"):
            codec.decode(damaged)
    with pytest.raises(cache.CacheError, match=r"codec version 9, this program reads version 1"):
        codec.decode(b"\x09" + packed[1:])


def test_a_row_of_512_tokens_and_64_ids_is_packed_in_milliseconds():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 151_936, (512, 64))
    signal = cache.TopK(ids, -np.sort(rng.random((512, 64))), np.zeros(512))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        codec.decode(codec.encode(signal))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2
    assert len(codec.encode(signal)) <= 512 * (64 * 8 + 4) + 1024


def test_a_top_k_of_one_width_takes_any_integer_and_float_dtype():
    signal = cache.TopK(np.arange(KEPT, dtype=np.int64)[None], np.full((1, KEPT), -2.0), np.array([-1.0]))
    assert signal.ids.dtype == np.int32
    assert signal.logprobs.dtype == np.float32
    with pytest.raises(cache.CacheError, match=r"signal\.ids holds numbers that do not fit int32"):
        cache.TopK(np.array([[2**40]]), np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(cache.CacheError, match=r"signal\.ids is an array of float64; expected int32"):
        cache.TopK(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(cache.CacheError, match=r"signal\.log_tail_mass has shape \[1, 1\]; expected 1 dimension\."):
        cache.TopK(np.zeros((1, 1), int), np.zeros((1, 1)), np.zeros((1, 1)))
    with pytest.raises(cache.CacheError, match=r"an array of float32 .* uint16, which carries bfloat16"):
        cache.Hidden(np.zeros((2, 2), np.float32), "bfloat16")
