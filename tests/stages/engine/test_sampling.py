"""The draw and the sampling distribution."""

import numpy as np
import pytest
import torch

from stages.engine import sampling as sampling_module
from stages.engine.protocol import Sampling
from stages.engine.sampling import block_statistics, choose, sampling_logits

V = 1000  # not used by the draw
SAMPLED = Sampling(V)


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling = SAMPLED) -> torch.Tensor:
    return choose(logits, uniforms, torch.full((len(uniforms),), -1), sampling).token


@pytest.fixture(params=[1024, 2, 3], ids=lambda size: f"blocks of {size}")
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "BLOCK", request.param)


@pytest.mark.usefixtures("_block_size")
def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.9999999], dtype=torch.float64)
    assert draw(p.log().expand(len(uniforms), 4), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.usefixtures("_block_size")
def test_draw_never_gives_a_token_without_mass() -> None:
    p = torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.6, 0.0, 0.0]])
    uniforms = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])])
    assert set(draw(p.log().expand(1001, 7), uniforms).tolist()) == {1, 4}


@pytest.mark.usefixtures("_block_size")
def test_drawn_frequencies_are_the_probabilities() -> None:
    """A chi-square statistic below the 1 - 1e-6 quantile of 12 degrees of freedom (51.7)."""
    num_draws, size = 20_000, 13
    logprobs = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).mul(1.5).log_softmax(-1)
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(num_draws))
    counts = torch.bincount(draw(logprobs.expand(num_draws, size) + 30.0, uniforms), minlength=size)
    expected = logprobs[0].double().exp() * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 51.7


def test_a_draw_over_many_blocks_is_the_search_in_one_cumulative_sum() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)) * 3
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
    assert torch.equal(draw(logits, uniforms), wanted)
    assert torch.equal(draw(logits, uniforms, Sampling(V, greedy=True)), logits.argmax(-1))


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize(
    "sampling", [Sampling(V), Sampling(V, (), 0.7), Sampling(V, top_k=5), Sampling(V, (), 1.3, top_p=0.6)]
)
def test_logprob_and_entropy_are_those_of_the_distribution_that_is_drawn_from(sampling: Sampling) -> None:
    logits = torch.randn(20, 4099, generator=torch.Generator().manual_seed(3)) * 2 + 40
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = choose(logits, uniforms, torch.full((20,), -1), sampling)
    logprobs = sampling_logits(logits, sampling).double().log_softmax(-1)
    wanted = logprobs.gather(1, found.token[:, None])[:, 0]
    torch.testing.assert_close(found.logprob.double(), wanted, rtol=1e-6, atol=1e-5)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


def test_a_forced_token_is_taken_and_the_others_are_drawn() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 3] = 50.0
    found = choose(logits, torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([7, -1]), Sampling(V))
    assert found.token.tolist() == [7, 3]
    assert found.logprob.tolist() == pytest.approx([-50.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_broken_logit_gives_a_nan_logprob_and_a_token_of_the_vocabulary(value: float, greedy: bool) -> None:
    logits = torch.zeros(2, 3000)
    logits[1, 1500] = value
    found = choose(
        logits, torch.full((2,), 0.9, dtype=torch.float64), torch.tensor([-1, -1]), Sampling(V, greedy=greedy)
    )
    assert found.logprob.isnan().tolist() == [False, True]
    assert 0 <= int(found.token.min()) <= int(found.token.max()) < 3000


def test_a_block_without_mass_counts_nothing() -> None:
    logits = torch.full((1, 2048), -torch.inf)
    logits[0, 5] = -1e30
    blocks = block_statistics(logits)
    assert blocks.mass.tolist() == [[1.0, 0.0]]
    assert blocks.moment.abs().max() == 0


def oracle(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities after temperature, top-k and top-p, token by token in float64."""
    z = [value / sampling.temperature for value in logits]
    weights = [np.exp(value - max(z)) for value in z]
    order = sorted(range(len(z)), key=lambda i: -weights[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass / total >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(z))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(V),
        Sampling(V, (), 0.5),
        Sampling(V, top_k=1),
        Sampling(V, top_k=4),
        Sampling(V, top_p=0.01),
        Sampling(V, top_p=0.6),
        Sampling(V, (), 1.7, 0.9, 6),
        Sampling(V, (), 0.8, 0.3, 3),
        Sampling(V, top_k=1000),
    ],
    ids=str,
)
def test_the_sampling_distribution_agrees_with_the_loop(sampling: Sampling) -> None:
    logits = torch.randn(7, 19, generator=torch.Generator().manual_seed(1)) * 2
    found = sampling_logits(logits, sampling).softmax(-1)
    for row in range(7):
        np.testing.assert_allclose(found[row].numpy(), oracle(logits[row].tolist(), sampling), atol=1e-6)
