"""What `megavideo generate` was asked to do, checked before anything is loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.generate.enlarge import direct_config_of, iterative_config_of
from megavideo.generate.load import folder_digest, open_checkpoint
from megavideo.generate.pipeline import Drawing
from megavideo.generate.requests import Request, read_prompts, requests_of
from megavideo.generate.work import Work, first_frame_work, interpolation_work, keyframe_work
from megavideo.sampling.clusters import load_labels
from megavideo.sampling.strategy import Strategy
from megavideo.superres.checkpoint import MANIFEST as SUPERRES_MANIFEST
from megavideo.superres.config import DirectConfig, IterativeConfig


@dataclass(frozen=True)
class Settings:
    """The options of `megavideo generate`, which documents them (command.py)."""

    checkpoint: Path | None
    stage2: Path | None
    superres: Path | None
    refine: Path | None
    model: Path | None
    window: int
    image_tokenizer: Path
    text_tokenizer: Path | None
    output: Path
    prompt: tuple[str, ...]
    prompts: Path | None
    samples: int
    first_frame: Path | None
    interpolate: Path | None
    fps: float
    rounds: int | None
    seed: int
    guidance: float
    text_weight: float
    first_temperature: float
    first_top_k: int
    temperature: float
    top_k: int
    top_p: float
    clusters: Path | None
    code_temperature: float
    superres_temperature: float
    image_suffix: str
    video_suffix: str
    reference_compat: bool
    precision: str | None
    batch: int
    tp: int
    dry_run: bool

    def check(self) -> None:
        """Raises: ValueError or FileNotFoundError for what does not go together or is not there."""
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError("name either --prompt, once or more, or --prompts FILE")
        if self.interpolate is not None:
            if self.checkpoint or self.first_frame:
                raise ValueError(
                    "--interpolate VIDEO starts from that video's frames: leave --checkpoint and "
                    "--first-frame away"
                )
            if self.stage2 is None:
                raise ValueError("--interpolate needs --stage2, which draws frames between frames")
            if len(self.requests) != self.samples:
                raise ValueError("--interpolate takes one --prompt, which says what VIDEO shows")
        elif self.checkpoint is None:
            raise ValueError("name --checkpoint, a run of stage keyframes (or use --interpolate)")
        if self.rounds and self.stage2 is None:
            raise ValueError(f"--rounds {self.rounds} needs --stage2")
        if self.refine is not None and self.superres is None:
            raise ValueError("--refine draws anew what --superres DIR made: name both")

    @cached_property
    def requests(self) -> list[Request]:
        """Every video, in order."""
        prompts = list(self.prompt) if self.prompts is None else read_prompts(self.prompts)
        return requests_of(prompts, self.samples)

    @property
    def doublings(self) -> int:
        """How often stage 2 doubles the frame rate: as asked, else 3 times, to 8 times --fps."""
        if self.stage2 is None:
            return 0
        return 3 if self.rounds is None else self.rounds

    @cached_property
    def keyframe_stage(self) -> tuple[Path, Config] | None:
        """Stage 1's checkpoint and configuration, if it is used."""
        return None if self.checkpoint is None else self._open(self.checkpoint, "keyframes")

    @cached_property
    def interpolation_stage(self) -> tuple[Path, Config] | None:
        """Stage 2's, if it is used; of --interpolate's video it says the sizes in any case."""
        if self.stage2 is None or not (self.doublings or self.interpolate):
            return None
        return self._open(self.stage2, "interpolation")

    @cached_property
    def superres_stages(self) -> dict[str, tuple[Path, DirectConfig | IterativeConfig]]:
        """Folder and sizes of the super-resolution models that are used, in their order."""
        if self.superres is None:
            return {}
        direct = direct_config_of(self.superres, self.any_config.model)
        if self.refine is None:
            return {"superres": (self.superres, direct)}
        iterative = iterative_config_of(self.refine, direct)
        return {"superres": (self.superres, direct), "refine": (self.refine, iterative)}

    def _open(self, path: Path, stage: str) -> tuple[Path, Config]:
        checkpoint, config = open_checkpoint(path, stage, self._bare_config(stage))
        recipe, data = config.recipe, config.data
        if self.precision:
            recipe = recipe.model_copy(update={"precision": self.precision})
        if self.text_tokenizer:
            data = data.model_copy(update={"text_tokenizer": str(self.text_tokenizer)})
        return checkpoint, config.model_copy(update={"recipe": recipe, "data": data})

    def _bare_config(self, stage: str) -> Config | None:
        """Of weights that are no run of ours: sizes from --model, the rest as published."""
        if self.model is None:
            return None
        if self.text_tokenizer is None:
            raise ValueError("--model needs --text-tokenizer: bare weights do not name theirs")
        window = self.window if stage == "interpolation" else 0
        settings = {
            "recipe.stage": stage,
            "recipe.window": window,
            "recipe.steps": 1,
            "data.train": "nowhere",
            "data.text_tokenizer": self.text_tokenizer,
            "run.directory": "nowhere",
        }
        return load_config([self.model], [f"{key}={value}" for key, value in settings.items()])

    @property
    def any_config(self) -> Config:
        """A configuration that is used: both stages share image codes and grid."""
        stage = self.keyframe_stage or self.interpolation_stage
        assert stage is not None, "check() refuses this"
        return stage[1]

    @property
    def labels(self) -> Tensor | None:
        """Each image code's cluster, if clusters are used."""
        if self.clusters is None:
            return None
        return load_labels(self.clusters, self.any_config.model.image_codes)

    def drawing(self) -> Drawing:
        """How tokens are drawn.

        Raises: ValueError for impossible settings or labels of another codebook.
        """
        labels = self.labels

        def strategy(temperature: float, top_k: int) -> Strategy:
            inner = self.code_temperature if labels is not None else 1.0
            return Strategy(temperature, top_k, self.top_p, labels, inner)

        return Drawing(
            self.seed,
            strategy(self.first_temperature, self.first_top_k),
            strategy(self.temperature, self.top_k),
            self.guidance,
            self.text_weight,
            self.image_suffix,
            self.video_suffix,
            self.reference_compat,
        )

    def work(self, given_frames: int) -> Work:
        """Of one video; `given_frames` is the length of --interpolate's video."""
        work, frames = Work(), given_frames
        if self.keyframe_stage is not None:
            config = self.keyframe_stage[1]
            frames = config.model.frames
            work += keyframe_work(config, self.guidance != 1)
            work += Work() if self.first_frame else first_frame_work(config)
        if self.interpolation_stage is not None:
            work += interpolation_work(self.interpolation_stage[1], frames, self.doublings)
        return work

    def frames(self, given_frames: int) -> int:
        """Frames of a finished video."""
        if self.keyframe_stage is not None:
            given_frames = self.keyframe_stage[1].model.frames
        return (given_frames - 1) * 2**self.doublings + 1

    def untrained_rates(self) -> dict[str, list[float]]:
        """Frame rates that a stage will be asked for, but was not trained at."""
        rates = {
            "stage 1": (self.keyframe_stage, [self.fps]),
            "stage 2": (
                self.interpolation_stage,
                [self.fps * 2 ** (n + 1) for n in range(self.doublings)],
            ),
        }
        return {
            name: missing
            for name, (stage, wanted) in rates.items()
            if stage and (missing := [r for r in wanted if r not in stage[1].recipe.frame_rates])
        }

    def described(self) -> dict[str, Any]:
        """All that a video depends on besides its prompt and number, for its about.json."""
        names = (
            "seed", "fps", "guidance", "text_weight", "first_temperature", "first_top_k",
            "temperature", "top_k", "top_p", "code_temperature", "image_suffix", "video_suffix",
            "reference_compat",
        )  # fmt: skip
        files = {
            "text_tokenizer": Path(self.any_config.data.text_tokenizer),
            "image_tokenizer": self.image_tokenizer,
            "clusters": self.clusters,
            "first_frame": self.first_frame,
            "interpolate": self.interpolate,
        }
        described = {name: getattr(self, name) for name in names}
        described["rounds"] = self.doublings
        for name, path in files.items():
            described[name] = None if path is None else xxhash.xxh3_128_hexdigest(path.read_bytes())
        for name, (folder, _) in self.superres_stages.items():
            described[name] = folder_digest(folder, SUPERRES_MANIFEST)
            described["superres_temperature"] = self.superres_temperature
        for name, stage in (("stage1", self.keyframe_stage), ("stage2", self.interpolation_stage)):
            described[name] = None if stage is None else _described(*stage)
        return described


def _described(checkpoint: Path, config: Config) -> dict[str, str]:
    return {
        "checkpoint": checkpoint.name,
        "digest": folder_digest(checkpoint),
        "precision": config.recipe.precision,
    }
