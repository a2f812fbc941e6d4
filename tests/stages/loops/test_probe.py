"""The probe at a refresh: what generates is what trains, and it has moved."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

import cache
from stages.data.alignment import align, at_scored
from stages.engine import built_in, weights
from stages.engine.opening import open_engine
from stages.loops import probe, refresh
from stages.models.student import Student
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.support.helpers import make_run, records_of
from tests.support.thinning import thinned
from tests.support.tiny_runs import TINY, stir, student_of, train, write_rollouts

ONE_LAYER = "layers.2."


@contextmanager
def scaled(model: Any, factor: float, where: str = "") -> Iterator[None]:
    """The adapters of layers with `where` in their names count `factor` times as much."""
    layers = [m for name, m in model.named_modules() if isinstance(m, LoraLinear) and where in name]
    assert layers
    own = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = {name: factor * scale for name, scale in layer.scaling.items()}
    yield
    for layer, scaling in zip(layers, own, strict=True):
        layer.scaling = scaling


@contextmanager
def with_adapter(model: Any, older: dict[str, torch.Tensor]) -> Iterator[None]:
    parameters = {name: p for name, p in model.named_parameters() if name in older}
    own = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(older[name])
        yield
        for name, parameter in parameters.items():
            parameter.copy_(own[name])


OTHER_POLICIES: dict[str, Callable[[Any, dict[str, torch.Tensor]], Any]] = {
    "adapter left out": lambda model, _: scaled(model, 0.0),
    "adapter of the refresh before": with_adapter,
    "scale off by 10 %": lambda model, _: scaled(model, 0.9),
    "one layer unmerged": lambda model, _: scaled(model, 0.0, ONE_LAYER),
}


class Trained:
    """A student that has moved since a first refresh, and the adapter that it had then."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.run: Run = make_run(folder, **(TINY | {"dtype": dtype, "rollouts_per_refresh": 32}))
        self.student: Student = student_of(self.run)
        self.engine: Any = open_engine(self.student.model)
        write_rollouts(self.run, self.student)
        stir(self.student, 0.06)
        self.before = {name: p.detach().clone() for name, p in self.student.trainable.items()}
        refresh.check_generator(self.run, self.student, self.engine, 1)
        with torch.no_grad():
            for parameter in self.student.trainable.values():
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.04
                )

    def check(self) -> dict[str, float]:
        return refresh.check_generator(self.run, self.student, self.engine, 2)


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), request.param)


class OfAnotherPolicy:
    """The engine of a model that is another policy while it generates."""

    def __init__(self, model: Any, tamper: Callable[[Any], Any]) -> None:
        self._model, self._tamper = model, tamper

    def generate(self, *arguments: Any) -> Any:
        with self._tamper(self._model), closing(open_engine(self._model)) as engine:
            return engine.generate(*arguments)

    def close(self) -> None: ...


def generates_tampered(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Any], Any]
) -> None:
    """The student's own model is another one while it generates."""
    monkeypatch.setattr(trained, "engine", OfAnotherPolicy(trained.student.model, tamper))


def merges_tampered(trained: Trained, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Any], Any]) -> None:
    """The engine makes its weights of another adapter."""

    class Tampered(weights.DecodingWeights):
        def __init__(self, *arguments: Any) -> None:
            with tamper(trained.student.model):
                super().__init__(*arguments)

    monkeypatch.setattr(built_in, "DecodingWeights", Tampered)


def generates_elsewhere(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Any], Any]
) -> None:
    """Another model object generates, of which only its logprobs are seen."""

    other = copy.deepcopy(trained.student.model)
    monkeypatch.setattr(trained, "engine", OfAnotherPolicy(other, tamper))


@pytest.mark.parametrize(
    ("what", "how"), thinned(5, OTHER_POLICIES, [generates_tampered, merges_tampered, generates_elsewhere])
)
def test_another_policy_is_an_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, how: Callable[..., None], what: str
) -> None:
    how(trained, monkeypatch, lambda model: OTHER_POLICIES[what](model, trained.before))
    with pytest.raises(
        UserError, match="the rollout engine does not run the student in training: at refresh 2"
    ):
        trained.check()


def test_the_student_itself_is_not_and_its_figures_say_so(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained.check()
    assert found["probe_moved"] > 0.005
    assert found["probe_gap"] <= found["probe_bound"]
    for other in ("without_adapter", "refresh_before"):
        assert abs(found[f"probe_{other}"]) < 0.03
        assert 0 < found[f"probe_{other}_error"] < 0.02
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_full_fine_tuning_is_held_against_the_weights_of_the_refresh_before(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **(TINY | {"dtype": dtype, "use_lora": "false"}))
    student = student_of(run)
    write_rollouts(run, student)
    refresh.check_generator(run, student, open_engine(student.model), 1)
    older = copy.deepcopy(student.model)
    with torch.no_grad():
        for parameter in student.trainable.values():
            parameter.mul_(
                1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    found = refresh.check_generator(run, student, open_engine(student.model), 2)
    assert found["probe_moved"] > 0.005
    assert abs(found["probe_refresh_before"]) < 3 * found["probe_refresh_before_error"]
    with pytest.raises(
        UserError, match="of the way from the student's to those of the previous refresh's student"
    ):
        refresh.check_generator(run, student, open_engine(older), 2)


def test_one_stale_layer_of_a_fully_trained_student_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **(TINY | {"dtype": "bf16", "use_lora": "false"}))
    student = student_of(run)
    write_rollouts(run, student)
    layer = student.base.get_decoder().layers[2].mlp.up_proj

    class Stale(weights.DecodingWeights):
        def __init__(self, *arguments: Any) -> None:
            with torch.no_grad():
                own = layer.weight.clone()
                layer.weight *= 1 + 0.05 * torch.randn(own.shape)
                super().__init__(*arguments)
                layer.weight.copy_(own)

    monkeypatch.setattr(built_in, "DecodingWeights", Stale)
    with pytest.raises(UserError, match=r"the output of layer layers\.2\.mlp\.up_proj differs by"):
        refresh.check_generator(run, student, open_engine(student.model), 1)


def test_rounding_without_a_direction_is_a_warning_with_figures(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten times what training's forward rounds, at random."""
    generator, size = probe.generator_logprobs, trained.check()["probe_trainer_rounding"]

    def noisy(*arguments: Any) -> np.ndarray:
        logprobs = generator(*arguments)
        return logprobs + np.random.default_rng(0).normal(0, 10 * size, logprobs.shape).astype(np.float32)

    monkeypatch.setattr(probe, "generator_logprobs", noisy)
    found = trained.check()
    assert found["probe_gap"] > found["probe_bound"]
    told = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("warning: generator and trainer")
    ]
    assert len(told) == 1
    assert f"{found['probe_gap']:.2g} nats a token" in told[0]


def test_a_trainer_without_its_adapter_is_an_error(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = probe.trainer_logprobs

    def without_adapter(student: Student, rows: Any, packed: bool | None = None) -> np.ndarray:
        with student.model.disable_adapter():
            return trainers(student, rows, packed)

    monkeypatch.setattr(probe, "trainer_logprobs", without_adapter)
    with pytest.raises(UserError, match="the rollout engine does not run the student in training"):
        trained.check()


def test_one_token_that_moved_far_and_is_rounded_much_is_no_direction() -> None:
    random = np.random.default_rng(0)
    exact, other = np.zeros(200), random.normal(0, 0.01, 200)
    trainer, generator = (random.normal(0, 0.01, 200) for _ in range(2))
    other[7], generator[7] = 5.0, 0.6
    found = probe.share_of("without_adapter", generator, exact, other, trainer, [20] * 10)
    assert found is not None
    assert abs(found.value) < 3 * found.error


@pytest.mark.parametrize(("share", "tokens"), [(1.0, 50), (0.1, 2000)])
def test_a_share_of_another_policy_stands_out_of_rounding_as_large_as_the_way(
    share: float, tokens: int
) -> None:
    random = np.random.default_rng(0)
    exact, other = np.zeros(tokens), random.normal(0, 0.2, tokens)
    trainer, generator = (random.normal(0, 0.05, tokens) for _ in range(2))
    found = probe.share_of(
        "refresh_before", generator + share * other, exact, other, trainer, [10] * (tokens // 10)
    )
    assert found is not None
    assert found.value == pytest.approx(share, abs=3 * found.error)
    assert found.value > probe.SIGNIFICANT * found.error
    healthy = probe.share_of("refresh_before", generator, exact, other, trainer, [10] * (tokens // 10))
    assert healthy is not None
    assert abs(healthy.value) < 3 * healthy.error


def test_a_probe_of_an_earlier_form_is_not_compared_with(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    write_rollouts(run, student)
    refresh.check_generator(run, student, open_engine(student.model), 1)
    path = run.folder / "probe.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"logprobs": {"1": kept["logprobs"]["1"][:-1]}}))
    assert refresh.check_generator(run, student, open_engine(student.model), 2)["probe_moved"] == 0


def test_a_student_that_did_not_move_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    write_rollouts(run, student)
    refresh.check_generator(run, student, open_engine(student.model), 1)
    with pytest.raises(UserError, match="did not change between refresh 1 and 2"):
        refresh.check_generator(run, student, open_engine(student.model), 2)
    stir(student)
    assert refresh.check_generator(run, student, open_engine(student.model), 2)["probe_moved"] > 0


def test_the_first_refresh_is_compared_with_the_untrained_student(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert records_of(run.folder, "refresh")[0]["probe_moved"] > 0


def test_the_first_steps_in_bfloat16_reach_the_generator(tmp_path: Path) -> None:
    """Their updates are less than half a step of the weights into which the generator merges them."""
    run = make_run(tmp_path, **(TINY | {"dtype": "bf16"}))
    student = student_of(run)
    write_rollouts(run, student)
    rows: Any = cache.open(run.config.cache_root)[:]

    def logprobs() -> tuple[np.ndarray, np.ndarray]:
        return probe.trainer_logprobs(student, rows), probe.generator_logprobs(
            student, open_engine(student.model), rows
        )

    before = logprobs()
    aligned = align([r.prompt_ids for r in rows], [r.completion_ids for r in rows], 0, student.device)
    optimizer = torch.optim.Adam(student.trainable.values(), lr=3e-5)
    for _ in range(2):
        logits = at_scored(student.hidden(aligned), aligned).float() @ student.head.weight.float().t()
        torch.nn.functional.cross_entropy(logits, aligned.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer, generator = (float((b - a).mean()) for a, b in zip(before, logprobs(), strict=True))
    assert trainer > 2e-3
    assert generator == pytest.approx(trainer, rel=0.2)
