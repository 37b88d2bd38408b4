"""Configuration: what composes, and the one clear error for everything that does not."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from megavideo.config.command import main
from megavideo.config.load import dump_config, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = [CONFIGS / "model/tiny.yaml", CONFIGS / "recipe/stage1.yaml"]
NEEDED = ["data.train=shards", "data.text_tokenizer=text.model", "run.directory=run"]


def load(*assignments: str, files: list[Path] | None = None):  # type: ignore[no-untyped-def]
    return load_config(FILES if files is None else files, [*NEEDED, *assignments])


def test_files_compose_and_assignments_override(tmp_path: Path) -> None:
    config = load("recipe.steps=7", "recipe.optimizer.lr=1e-3", "recipe.frame_rates=[1, 2.5]")
    assert (config.model.hidden, config.recipe.steps, config.recipe.optimizer.lr) == (32, 7, 1e-3)
    assert config.recipe.frame_rates == (1.0, 2.5)


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load("recipe.steps=7")
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config))
    assert load_config([file]) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "recipe.optimiser.lr=1",
            "unknown key recipe.optimiser={'lr': 1} .*did you mean recipe.op",
        ),
        (
            "recipe.optimizer.betta=1",
            r"unknown key recipe.optimizer.betta=1 \(--set recipe.optimiz",
        ),
        ("recipe.steps=3.5", r"recipe.steps=3.5 \(--set recipe.steps=3.5\): use a valid integer"),
        ("recipe.steps=many", "recipe.steps='many' .*use a valid integer"),
        ("recipe.steps=0", "recipe.steps=0 .*greater than or equal to 1"),
        ("recipe.hidden_dropout=.nan", "recipe.hidden_dropout"),
        ("recipe.stage=stage3", "recipe.stage='stage3' .*'image', 'keyframes' or 'interpolation'"),
        ("model.heads=5", "model.heads=5 does not divide model.hidden=32; use one of 1, 2, 4"),
        (
            "parallel.tp=3",
            "parallel.tp=3 does not divide model.heads=4; use one of 1, 2, 4",
        ),
        (
            "parallel.sequence_parallel=true",
            "parallel.sequence_parallel=True has no effect with parallel.tp=1",
        ),
        ("recipe.window=3", "recipe.window=3 does not divide model.side=4; use one of 2, 4"),
        ("recipe.window=1", "recipe.window=1 cannot be shifted"),
        ("recipe.stage=interpolation", "recipe.stage=interpolation needs a window"),
        ("recipe.min_fps=9", "recipe.min_fps=9.0 leaves none"),
        ("model.text_slots=17", "model.text_slots=17 overlaps model.image_position=16"),
        ("model.pad=500", "model.pad=500 is outside the vocabulary"),
        ("run.evaluate_every=5", "run.evaluate_every=5 needs data.validation"),
        (
            "run.keep_every=1500",
            r"only every 3000th step, .* run.save_every=1000 saves; use a mult",
        ),
        ("steps=5", "write section.key=value"),
        ("recipe.steps", "write section.key=value"),
        ("recipe.steps.more=1", "recipe.steps is a value|steps is a value"),
        ("recipe.frame_rates=[1, 2", r"--set recipe.frame_rates=\[1, 2: the value is not valid"),
    ],
)
def test_a_mistake_is_one_error_with_value_place_and_remedy(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(assignment)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["model.text_slots=6"], r"text_slots=6 and the 80 image slots .* parallel.tp=2, or "),
        (["model.text_slots=7"], r"over parallel.tp=4; parallel.sequence_parallel=False"),
        (["model.frames=3", "model.side=1", "recipe.window=0"], r"the 3 image slots of stage"),
    ],
)
def test_slots_that_cannot_be_cut_evenly_are_refused(assignments: list[str], message: str) -> None:
    cut = ["parallel.tp=4", "parallel.sequence_parallel=true"]
    with pytest.raises(ValueError, match=message):
        load(*cut, *assignments)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["parallel.zero=2"], r"parallel.zero=2 cuts gradients .* use parallel.zero=1, or"),
        (["parallel.virtual_stages=4"], r"is more than model.layers=4; lower one"),
        (["parallel.pp=1", "parallel.partition=[6]"], r"partition=\(6,\) has no effect without"),
        (["parallel.pp=1", "parallel.virtual_stages=2"], r"virtual_stages=2 has no effect without"),
        (["parallel.partition=[6]"], r"partition=\[6\] names 1 runs .* give 2 numbers"),
        (["parallel.partition=[2, 3]"], r"partition=\[2, 3\] adds up to 5, .* add up to 6"),
        (["parallel.partition=[5, 1]"], r"partition=\[5, 1\] leaves embedding or head alone"),
        (["parallel.offload_optimizer=true"], r"does not work with a pipeline \(parallel.pp=2\)"),
        (["recipe.stage=image"], r"parallel.pp=2 would put .* use parallel.pp=1"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("model.layers=4", "parallel.pp=2", *assignments)


def test_the_same_key_in_two_files_is_an_error_that_names_both(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("recipe: {steps: 3}\n")
    with pytest.raises(ValueError, match=r"recipe.steps is set in both .*stage1.yaml and .*more"):
        load(files=[*FILES, file])


def test_a_key_twice_in_one_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("run:\n  log_every: 1\n  log_every: 2\n")
    with pytest.raises(ValueError, match="duplicate key"):
        load(files=[*FILES, file])


def test_a_section_without_settings_takes_none_away(tmp_path: Path) -> None:
    some, none = tmp_path / "some.yaml", tmp_path / "none.yaml"
    some.write_text("parallel: {zero: 3}\n")
    none.write_text("parallel: {}\n")
    for files in ((some, none), (none, some)):
        assert load(files=[*FILES, *files]).parallel.zero == 3


def test_a_missing_file_and_a_missing_key_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file nowhere\.yaml"):
        load_config(["nowhere.yaml"])
    with pytest.raises(ValueError, match=r"run.directory is not set|run is not set"):
        load_config(FILES, NEEDED[:2])


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().recipe.steps = 5


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("model/*.yaml")), ids=lambda f: f.stem)
@pytest.mark.parametrize("recipe", ["base", "stage1", "stage2"])
def test_every_shipped_model_fits_every_published_recipe(file: Path, recipe: str) -> None:
    window = "0" if recipe != "stage2" else {"tiny": "2", "demo": "4"}.get(file.stem, "10")
    load(f"recipe.window={window}", files=[file, CONFIGS / f"recipe/{recipe}.yaml"])


def test_every_setting_is_explained() -> None:
    output = CliRunner().invoke(main, ["--explain"]).output
    assert "recipe.optimizer.clip = 0.1\n    largest global gradient norm" in output
    assert "None\n    None" not in output
