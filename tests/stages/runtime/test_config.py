"""The typed configuration: its keys, its files and flags, and the sentences for mistakes."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualkl import DualKLConfig
from stages.runtime import config as configuration
from stages.runtime.config import SECTION_OF, SECTIONS, Config, name_and_revision, parse_arguments
from stages.runtime.errors import UserError
from stages.runtime.flags import ELSEWHERE, REMOVED
from stages.runtime.split import rows_per_micro_step
from tests.support.helpers import ROOT

LAUNCH_LINE = shlex.split(
    "--student_model Qwen/Qwen3-4B --teacher_model Qwen/Qwen3-32B --dataset tulu3 --batch_size 256"
    " --group_size 4 --grad_accum 8 --max_new_tokens 512 --use_lora --lora_r 64 --dtype bf16 --tau 1.0"
    " --alpha 5.0 --gating soft --rkl exact --fkl full --wandb_project p --wandb_name n --teacher_ds_zero3"
    " --gen_micro_batch 4 --lp_micro_batch 8"
)


def parse(*arguments: str) -> Config:
    return parse_arguments(list(arguments), "")


def leaf(config: Config, name: str) -> Any:
    return getattr(getattr(config, SECTION_OF[name]), name)


def sentence(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# The file that people read


def test_pipeline_yaml_has_exactly_the_typed_keys() -> None:
    content = yaml.safe_load((ROOT / "pipeline.yaml").read_text())
    assert {name: set(keys) for name, keys in content.items()} == {
        n: set(s.model_fields) for n, s in SECTIONS.items()
    }


KEYS = {
    "run": "run_name runs_dir cache_dir extra_caches seed device dtype",
    "models": "student_model student_adapter teacher_model teacher_dtype teacher_ds_zero3 teacher_ds_config"
    " teacher_quantization"
    " attn_implementation",
    "lora": "use_lora lora_r lora_alpha lora_dropout lora_targets",
    "data": "dataset num_prompts max_prompt_tokens allow_skipped system_prompt chat_template_kwargs",
    "rollout": "group_size max_new_tokens eos_token sample_temperature sample_top_p sample_top_k"
    " gen_micro_batch lp_micro_batch rollouts_per_unit role",
    "teacher_signal": "signal signal_k signal_p",
    "loss": "tau tau_share alpha gating rkl fkl temperature importance_cap objective gate_on"
    " teacher_smoothing",
    "train": "batch_size grad_accum micro_batch_tokens packing compile max_steps lr warmup_steps"
    " max_grad_norm gradient_checkpointing checkpoint_every keep_checkpoints resume_from"
    " export_checkpoint",
    "refresh": "refresh_mode refresh_every refresh_drift rollouts_per_refresh max_age",
    "eval": "eval_dataset eval_prompts eval_every answer_checker eval_teacher_text",
    "log": "wandb_project wandb_name trace_every",
}


def test_the_keys_are_those_on_record() -> None:
    """A new key needs a reason (can an existing one, a constant or a convention serve?); one that goes,
    advice.
    """
    assert {name: " ".join(section.model_fields) for name, section in SECTIONS.items()} == KEYS


def test_every_key_of_pipeline_yaml_is_commented_on_its_line() -> None:
    lines = [line for line in (ROOT / "pipeline.yaml").read_text().splitlines() if re.match(r"  \w+:", line)]
    assert len(lines) == len(SECTION_OF)
    bare = [line for line in lines if not re.search(r"\s#\s*\S", line)]
    assert bare == []


def test_every_typed_key_has_a_description() -> None:
    fields = [field for section in SECTIONS.values() for field in section.model_fields.values()]
    assert all(field.description for field in fields)


def test_leaf_names_are_unique_over_the_sections() -> None:
    names = [name for section in SECTIONS.values() for name in section.model_fields]
    assert len(names) == len(set(names))
    assert not set(names) & set(SECTIONS)


VALIDATION = ("_check_training", "_check_loss", "_check_refresh")


def attributes(node: ast.AST) -> set[str]:
    """Names that code below `node` reads from an object, validation left out."""
    if isinstance(node, ast.FunctionDef) and node.name in VALIDATION:
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) else set()
    return own.union(*map(attributes, ast.iter_child_nodes(node)))


def test_every_key_is_read_somewhere() -> None:
    """As an attribute; the loss section is handed to dualkl whole, which must know its names."""
    read = set().union(*(attributes(ast.parse(path.read_text())) for path in (ROOT / "stages").rglob("*.py")))
    assert set(SECTION_OF) - read - set(DualKLConfig.__dataclass_fields__) == set()


def test_the_demo_and_the_typed_defaults_are_valid_configurations() -> None:
    assert parse().models.student_model == ""
    assert parse("--config", "pipeline.yaml").models.student_model == "examples/arithmetic/student"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("qwen*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid_and_divide_over_two_processes(path: Path) -> None:
    config = parse("--config", str(path))
    assert rows_per_micro_step(config, 2) == 16
    assert (config.loss.tau, config.loss.alpha, config.lora.lora_r) == (1.0, 5.0, 64)


def test_a_configuration_written_as_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = parse(
        "--config", "pipeline.yaml", "--lr", "3e-5", "--gen_micro_batch", "auto", "--importance_cap", ".inf"
    )
    again = parse("--config", write(tmp_path / "c.yaml", configuration.to_yaml(config)))
    assert again == config


# Files and flags


def test_a_later_file_wins_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "loss: {tau: 0.5, alpha: 7.0}\nlr: 0.01\n")
    second = write(tmp_path / "b.yaml", "tau: 0.25\n")
    config = parse("--config", first, "--config", second)
    assert (config.loss.tau, config.loss.alpha, config.train.lr) == (0.25, 7.0, 0.01)


def test_flags_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "tau: 0.5\n")
    assert parse("--tau", "0.75", "--config", path).loss.tau == 0.75
    assert parse("--config", path, "--tau=0.75").loss.tau == 0.75


def test_a_key_may_stand_in_its_section_or_at_the_top(tmp_path: Path) -> None:
    in_section = parse(
        "--config", write(tmp_path / "a.yaml", "teacher_signal: {signal: hidden, signal_k: 8}\n")
    )
    at_top = parse("--config", write(tmp_path / "b.yaml", "signal_k: 8\n"), "--signal", "hidden")
    assert in_section == at_top


def test_a_flat_file_may_name_the_signal(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "signal: hidden\n")).teacher_signal.signal == "hidden"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", ".0001", "1E-4"])
def test_scientific_notation_is_a_number_in_files_and_flags(tmp_path: Path, text: str) -> None:
    assert parse("--lr", text).train.lr == 1e-4
    assert parse("--config", write(tmp_path / "a.yaml", f"lr: {text}\n")).train.lr == 1e-4


def test_whole_numbers_stay_whole() -> None:
    assert parse("--max_steps", "100").train.max_steps == 100
    assert parse("--lr", "1").train.lr == 1.0
    assert "max_steps" in sentence("--max_steps", "1e2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--use_lora"], True),
        (["--use_lora", "true"], True),
        (["--use_lora", "false"], False),
        (["--use_lora=false"], False),
        (["--use_lora", "--tau", "1.0"], True),
    ],
)
def test_a_bare_switch_means_true_and_takes_a_value(arguments: list[str], expected: bool) -> None:
    assert parse(*arguments).lora.use_lora is expected


def test_the_zero3_switch_works_bare_and_with_a_value() -> None:
    assert parse("--config", "pipeline.yaml", "--teacher_ds_zero3").models.teacher_ds_zero3 is True
    assert parse("--teacher_ds_zero3", "false").models.teacher_ds_zero3 is False


def test_texts_that_look_like_numbers_stay_texts() -> None:
    config = parse("--run_name", "2024", "--eos_token", "1e5", "--wandb_name", "true")
    assert (config.run.run_name, config.rollout.eos_token, config.log.wandb_name) == (
        "2024",
        "1e5",
        "true",
    )


def test_the_original_launch_line_parses_to_its_values() -> None:
    config = parse(*LAUNCH_LINE)
    expected = {
        "student_model": "Qwen/Qwen3-4B",
        "teacher_model": "Qwen/Qwen3-32B",
        "dataset": "tulu3",
        "batch_size": 256,
        "group_size": 4,
        "grad_accum": 8,
        "max_new_tokens": 512,
        "use_lora": True,
        "lora_r": 64,
        "dtype": "bf16",
        "tau": 1.0,
        "alpha": 5.0,
        "gating": "soft",
        "rkl": "exact",
        "fkl": "full",
        "wandb_project": "p",
        "wandb_name": "n",
        "teacher_ds_zero3": True,
        "gen_micro_batch": 4,
        "lp_micro_batch": 8,
    }
    assert {name: leaf(config, name) for name in expected} == expected
    assert rows_per_micro_step(config, 2) == 16


def test_every_flag_of_the_original_prototype_exists() -> None:
    config = parse(*LAUNCH_LINE, "--teacher_ds_config", "teacher.json")
    assert config.models.teacher_ds_config == "teacher.json"


# Mistakes


def test_an_unknown_flag_names_the_nearest_key() -> None:
    assert (
        sentence("--grad_acum", "8") == "unknown key grad_acum on the command line; did you mean grad_accum?"
    )
    assert "did you mean lora_r?" in sentence("--lora_rr=8")


def test_an_unknown_key_names_the_nearest_one_and_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "loss: {taus: 0.5}\n")
    message = sentence("--config", path)
    assert message == f"unknown key taus in section loss of {path}; did you mean tau?"
    path = write(tmp_path / "a.yaml", "modles: {student_model: x}\n")
    assert sentence("--config", path) == f"unknown key modles in {path}; did you mean models?"
    assert "did you mean max_new_tokens?" in sentence(
        "--config", write(tmp_path / "b.yaml", "max_new_token: 5\n")
    )


def test_a_key_in_another_section_than_its_own_is_refused_or_understood(tmp_path: Path) -> None:
    config = parse("--config", write(tmp_path / "a.yaml", "train: {tau: 0.5}\n"))
    assert config.loss.tau == 0.5  # leaf names are unique: a section only groups


def test_flags_are_not_abbreviated() -> None:
    assert "did you mean" in sentence("--student_mode", "x")


@pytest.mark.parametrize(
    ("flag", "value", "kind"),
    [
        ("lr", "fast", "number"),
        ("max_steps", "many", "integer"),
        ("max_steps", "1.5", "integer"),
        ("use_lora", "maybe", "boolean"),
        ("gating", "softish", "'soft' or 'hard' or input should be a valid number"),
        ("batch_size", "0", "greater than or equal to 1"),
        ("lr", "true", "number"),
        ("sample_top_p", "1.5", "less than or equal to 1"),
        ("chat_template_kwargs", "x", "dictionary"),
        ("run_name", "a/b", "a-b is allowed"),
    ],
)
def test_an_ill_typed_value_names_key_type_and_value(flag: str, value: str, kind: str) -> None:
    message = sentence(f"--{flag}", value)
    assert f".{flag}" in message
    assert kind in message
    assert value.lower() in message.lower()


def test_an_ill_typed_micro_batch_names_the_key_and_both_possibilities() -> None:
    message = sentence("--gen_micro_batch", "some")
    assert "gen_micro_batch" in message
    assert "integer" in message
    assert "auto" in message


@pytest.mark.parametrize("flag", ["gen_micro_batch", "lp_micro_batch", "micro_batch_tokens"])
def test_a_cap_below_one_is_refused(flag: str) -> None:
    message = sentence(f"--{flag}", "0")
    assert f"{flag}: input should be greater than or equal to 1 or input should be 'auto', got 0" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tau", "-0.5"),
        ("--tau", ".nan"),
        ("--temperature", ".inf", "--signal", "full"),
        ("--gate_on", "fkl", "--gating", "0.5"),
        ("--teacher_smoothing", "1.0"),
        ("--objective", "jsd"),
        ("--objective", "jsd", "--gating", "0.5", "--rkl", "mc"),
        ("--objective", "jsd", "--gating", "1.0"),
    ],
)
def test_numbers_that_the_loss_refuses_are_refused_with_the_configuration(arguments: tuple[str, ...]) -> None:
    assert arguments[0].lstrip("-") in sentence(*arguments)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in sentence("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["loss: [1, 2]\n", "- 1\n", "loss: {tau: ]\n", "just words\n", "loss: 3\n"])
def test_a_file_that_is_no_configuration_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert path in sentence("--config", path)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("tau: 1\nseed: 1\ntau: 2\n", "tau", 3),
        ("loss: {alpha: 0.5}\nloss: {alpha: 0.1}\n", "loss", 2),
        ("dataset:\n  a: 1\n  'a': 3\n", "a", 3),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, key: str, line: int) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert sentence("--config", path) == (
        f"config file {path} is not valid YAML: the key '{key}' is given twice (line {line}); keep one."
    )


@pytest.mark.parametrize(
    "text", ["seed: 1\nrun: {seed: 2}", "run: {seed: 2}\nseed: 1", "run: {seed: 1}\ntrain: {seed: 1}"]
)
def test_a_key_in_two_places_of_a_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    said = f"config file {path} gives the key seed in two places, in sections or outside; keep one."
    assert sentence("--config", str(path)) == said


def test_a_data_set_given_twice_in_a_flag_is_refused() -> None:
    assert (
        sentence("--dataset", "{a: 1, a: 3}")
        == "config key dataset: the key 'a' is given twice (line 1); keep one."
    )


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    text = "chat_template_kwargs:\n  c: {b: &b {<<: &a {x: 1}, x: 2}}\n  d: {<<: *b, x: 3}\n"
    config = parse("--config", write(tmp_path / "a.yaml", text))
    assert config.data.chat_template_kwargs == {"c": {"b": {"x": 2}}, "d": {"x": 3}}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "# nothing\n")) == parse()


def test_a_positional_file_is_a_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "tau: 0.5\n")
    assert parse(path, "--alpha", "7").loss.tau == 0.5
    assert parse("--use_lora", path).loss.tau == 0.5


def test_a_flag_without_a_value_is_one_sentence() -> None:
    assert sentence("--lr") == "--lr needs a value: --lr VALUE."
    assert sentence("--lr", "--tau", "1") == "--lr needs a value: --lr VALUE."
    assert sentence("--config") == "--config needs a value: --config FILE."
    assert sentence("-lr", "1") == "unknown option -lr; keys are given as --KEY VALUE."


def test_a_negative_number_is_a_value() -> None:
    assert "got -0.5" in sentence("--lr", "-0.5")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "lr"),
        ("per-device-train-batch-size", "batch_size"),
        ("max_completion_length", "max_new_tokens"),
        ("max_length", "max_prompt_tokens and max_new_tokens"),
        ("output_dir", "run_name"),
    ],
)
def test_the_names_of_other_libraries_lead_to_ours(name: str, key: str) -> None:
    assert sentence(f"--{name}", "1") == f"unknown key {name} on the command line; did you mean {key}?"


def test_the_names_of_other_libraries_are_not_ours_and_lead_to_keys_that_exist() -> None:
    assert not ELSEWHERE.keys() & SECTION_OF.keys()
    assert {key for keys in ELSEWHERE.values() for key in keys.split(" and ")} <= SECTION_OF.keys()


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert sentence(str(tmp_path)) == f"config file {tmp_path} is a folder; name a YAML file in it."
    path = write(tmp_path / "config.yaml", "tau: 0.5\n")
    assert sentence("--config", str(tmp_path)).endswith(f"the configuration of its run is {path}.")


@pytest.mark.parametrize("key", ["student_model", "teacher_model", "dataset"])
def test_models_and_data_must_be_named(key: str) -> None:
    with pytest.raises(
        UserError, match=f"{key} is missing: give it in a configuration file .* or as --{key}"
    ):
        configuration.require(parse(), key)
    configuration.require(parse("--config", "pipeline.yaml"), key)


@pytest.mark.parametrize(("value", "mix"), [("0.3", 0.3), ("1", 1.0), ("fixed", 0.5)])
def test_a_number_is_a_constant_gate(value: str, mix: float) -> None:
    loss = parse("--gating", value).loss
    assert not loss.has_threshold
    assert loss.settings() == DualKLConfig(gating="fixed", mix=mix)
    assert parse("--gating", "hard").loss.settings() == DualKLConfig(gating="hard")


def test_without_held_out_prompts_nothing_is_measured_while_training() -> None:
    assert parse("--eval_prompts", "0").eval.eval_prompts == 0
    assert "set eval_prompts above 0" in sentence("--eval_prompts", "0", "--eval_every", "2")


# Arithmetic between keys


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(10, 4, 1), (16, 8, 4), (2, 1, 4), (7, 1, 2)])
def test_an_impossible_batch_says_what_would_divide(batch: int, accumulate: int, world: int) -> None:
    config = parse("--batch_size", str(batch), "--grad_accum", str(accumulate))
    with pytest.raises(UserError) as caught:
        rows_per_micro_step(config, world)
    assert f"batch_size {batch} cannot be cut" in str(caught.value)
    assert f"multiple of {world * accumulate}" in str(caught.value)


def test_a_possible_batch_gives_the_rows_of_a_micro_step() -> None:
    assert rows_per_micro_step(parse("--batch_size", "256", "--grad_accum", "8"), 2) == 16


def test_rollouts_must_be_whole_groups() -> None:
    message = sentence("--rollouts_per_refresh", "10", "--group_size", "4")
    assert "rollouts_per_refresh 10" in message
    assert "group_size 4" in message


@pytest.mark.parametrize("cut", [("--sample_top_p", "0.9"), ("--sample_top_k", "20")])
def test_the_sampled_reverse_kl_is_refused_for_rollouts_that_were_cut(cut: tuple[str, str]) -> None:
    assert "rkl: mc needs rollouts from the whole distribution" in sentence("--rkl", "mc", *cut)
    assert parse("--rkl", "exact", *cut)


@pytest.mark.parametrize("signal", ["topk", "nucleus"])
def test_another_temperature_is_refused_with_a_stored_top_k(signal: str) -> None:
    assert "stored at temperature 1" in sentence("--signal", signal, "--temperature", "2.0")
    assert parse("--signal", "hidden", "--temperature", "2.0").loss.temperature == 2.0


def test_the_sampled_reverse_kl_is_refused_at_another_temperature() -> None:
    assert "rkl: mc" in sentence("--signal", "hidden", "--temperature", "2.0", "--rkl", "mc")


# Keys that were removed


def test_a_removed_key_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    assert sentence("--max_staleness", "3") == (
        "the key max_staleness on the command line was removed: set max_age, which bounds the age of rows"
        " in every refresh_mode."
    )
    path = write(tmp_path / "a.yaml", "refresh: {replay_share: 0.5}\n")
    assert f"the key replay_share in section refresh of {path} was removed: set max_age" in sentence(
        "--config", path
    )
    path = write(tmp_path / "b.yaml", "gate: {tau_share: 0.5}\n")
    assert f"the section gate in {path} was removed: set tau_share in section loss" in sentence(
        "--config", path
    )


@pytest.mark.parametrize("key", REMOVED)
def test_the_advice_for_a_removed_key_is_a_sentence_about_keys_that_exist(key: str) -> None:
    assert key not in SECTION_OF
    assert key not in SECTIONS
    advice = REMOVED[key]
    assert not advice.endswith(".")
    assert not set(re.findall(r"\w+_\w+", advice)) & REMOVED.keys()


@pytest.mark.parametrize(
    "text",
    [
        "chat_template_kwargs: &a {x: *a}",
        "tau: " + "[" * 5000 + "]" * 5000,
        "max_steps: " + "9" * 5000,
        "max_steps: " + "9" * 50,
        "max_steps: 0x" + "f" * 5000,
        "tau: 2020-13-45",
        "tau: !!timestamp xyz",
        "tau: !!binary '***'",
        "? [a, b]\n: 1",
        "tau: 1\0",
        "chat_template_kwargs: {d: !!set {a}}",
        "- a",
        "tau: !!python/object/apply:os.getcwd []",
        "tau: " + "x" * 5000,
        "chat_template_kwargs:\n  a: &a [x, x, x, x, x, x, x, x, x, x]\n  b: &b [*a, *a, *a, *a, *a,"
        " *a, *a, *a, *a, *a]\n"
        "  c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\n  d: [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]",
    ],
)
def test_whatever_a_file_holds_is_data_or_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse("--config", str(path))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_file_of_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("run_name: café\n".encode("latin1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        parse("--config", str(path))


@pytest.mark.parametrize("name", ["..", ".", "...", "a/b", ""])
def test_a_run_stays_below_its_folder(name: str) -> None:
    with pytest.raises(UserError, match="run_name"):
        parse("--run_name", name)


@pytest.mark.parametrize("name", ["2021-02-30", "1e5", "12", "true", ".hidden", "null"])
def test_a_name_that_looks_like_something_else_is_written_and_read_as_itself(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "c.yaml").write_text(configuration.to_yaml(parse("--run_name", name)))
    assert parse("--config", str(tmp_path / "c.yaml")).run.run_name == name


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("examples/arithmetic/student@v2", "is a folder, which has no revisions"),
        ("Qwen/Qwen3-4B@", "nothing follows the @"),
    ],
)
def test_a_revision_that_cannot_be_read_is_refused(model: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse("--student_model", model)


def test_the_revision_of_a_hub_model_is_split_off() -> None:
    assert name_and_revision("Qwen/Qwen3-4B@abc") == ("Qwen/Qwen3-4B", "abc")
    assert name_and_revision("Qwen/Qwen3-4B") == ("Qwen/Qwen3-4B", "main")
    assert name_and_revision("examples/arithmetic/student") == ("examples/arithmetic/student", "main")


def test_a_renamed_key_still_works_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration.flags.present_name.cache_clear()
    assert parse("--score_tokens", "123").train.micro_batch_tokens == 123
    assert capsys.readouterr().err == "score_tokens is now micro_batch_tokens, which bounds every forward\n"
    path = tmp_path / "old.yaml"
    path.write_text("rollout: {score_tokens: 456}\n")
    assert parse("--config", str(path)).train.micro_batch_tokens == 456
    path.write_text("rollout: {score_tokens: 456}\ntrain: {micro_batch_tokens: 7}\n")
    assert "the key micro_batch_tokens in two places" in sentence("--config", str(path))
