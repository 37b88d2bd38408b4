"""Every setting of a run: its name, type, unit, default and meaning. Typed, frozen, strict.

A configuration is composed from YAML files, one section or more each (see load.py); the shipped
ones are under `configs/`. Impossible combinations are refused here, before anything starts.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megavideo.layout.grid import Grid

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Stage = Literal["image", "keyframes", "interpolation"]
Precision = Literal["fp32", "bf16", "fp16"]
Recompute = Literal["none", "mlp", "attention", "layer"]


class Section(BaseModel):
    """A frozen group of settings in which an unknown key or a wrong type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Sizes of the transformer and of its vocabulary (see docs/model.md)."""

    hidden: Count = Field(description="width h of the residual stream")
    heads: Count = Field(description="attention heads n; each has hidden / heads units")
    layers: Count = Field(description="transformer layers L")

    text_slots: Count = Field(64, description="text positions T, left-padded")
    frames: Count = Field(5, description="frames F of a video sample")
    side: Count = Field(20, description="image tokens per row and per column of a frame")

    vocab_size: Count = Field(150_010, description="rows of the word embedding")
    image_codes: Count = Field(20_000, description="image-codebook size; ids [0, image_codes)")
    pad: Natural = Field(20_003, description="token id that fills unused text slots")
    newline: Natural = Field(20_004, description="token id between the duration and the caption")
    begin_of_image: Natural = Field(150_000, description="token id that starts every frame's input")

    position_rows: Count = Field(1024, description="rows of the base position table")
    image_position: Natural = Field(512, description="base position of a frame's first token")
    frame_position_rows: Count = Field(
        2000, description="rows of the trainable position table for frames after the first"
    )
    norm_eps: Positive = Field(1e-5, description="epsilon of every LayerNorm")

    @property
    def grid(self) -> Grid:
        """The token grid of a video sample."""
        return Grid(self.text_slots, self.frames, self.side)

    @property
    def head_size(self) -> int:
        """Units per attention head."""
        return self.hidden // self.heads

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.hidden % self.heads:
            raise ValueError(
                f"model.heads={self.heads} does not divide model.hidden={self.hidden}; "
                f"use one of {_listed(_divisors(self.hidden))}"
            )
        for name in ("pad", "newline", "begin_of_image", "image_codes"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} is outside the vocabulary; "
                    f"it must be below model.vocab_size={self.vocab_size}"
                )
        per_frame = self.grid.tokens_per_frame
        if self.image_position + per_frame > self.position_rows:
            raise ValueError(
                f"model.position_rows={self.position_rows} cannot hold a frame at "
                f"model.image_position={self.image_position}; use at least "
                f"{self.image_position + per_frame}"
            )
        if self.text_slots > self.image_position:
            raise ValueError(
                f"model.text_slots={self.text_slots} overlaps model.image_position="
                f"{self.image_position}; raise image_position to at least {self.text_slots}"
            )
        if self.frame_position_rows < (self.frames - 1) * per_frame:
            raise ValueError(
                f"model.frame_position_rows={self.frame_position_rows} is less than the "
                f"{(self.frames - 1) * per_frame} tokens of frames 1-{self.frames - 1}; raise it"
            )
        return self


class OptimizerConfig(Section):
    """The optimiser (section 9 of the paper's settings)."""

    name: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw decouples weight decay; sgd is for parity checks"
    )
    lr: Positive = Field(2e-4, description="highest learning rate")
    betas: tuple[Probability, Probability] = Field((0.9, 0.95), description="Adam's moment decays")
    eps: Positive = Field(1e-8, description="Adam's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        1e-2, description="decay per step and unit of lr; never applied to biases"
    )
    clip: Annotated[float, Field(ge=0)] = Field(
        0.1, description="largest global gradient norm; 0 does not clip"
    )


class ScheduleConfig(Section):
    """Learning rate against step: linear warm-up, then a cosine from 1 to `floor`."""

    horizon: Count = Field(500_000, description="steps of the cosine")
    warmup: Probability = Field(0.001, description="linear warm-up, as a share of the horizon")
    floor: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="final share of the lr")
    hold_steps: Natural = Field(
        100,
        description="updates at `hold_rate` before anything else, gentle with weights that were "
        "trained before; 0 for a run that starts from none",
    )
    hold_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="lr share while held")


class RecipeConfig(Section):
    """What is learned, from which start, with which hyper-parameters."""

    stage: Stage = Field(
        description="image: the frozen base itself; keyframes: stage 1; interpolation: stage 2"
    )
    window: Natural = Field(
        0, description="side of the temporal channel's shifted windows; 0 sees whole frames"
    )
    min_fps: Positive = Field(1.0, description="keyframes: lowest frame rate that is used")
    frame_rates: tuple[Positive, ...] = Field(
        (1.0, 2.0, 4.0, 8.0), description="frame rates, in frames a second, that a sample may have"
    )
    hidden_dropout: Probability = Field(0.1, description="after the embedding and the MLP")
    attention_dropout: Probability = Field(0.1, description="on attention probabilities")

    base: str | None = Field(
        None,
        description="folder of the frozen text-to-image weights: a run, or any format that "
        "`megavideo convert` reads",
    )
    start_from: str | None = Field(
        None,
        description="checkpoint whose temporal channel this run starts from (stage 2: stage 1's)",
    )

    steps: Count = Field(description="optimizer steps to train")
    batch: Count = Field(416, description="samples a step, over all ranks and accumulation")
    micro_batch: Count = Field(4, description="samples a rank computes at once")
    precision: Precision = Field("bf16", description="type of weights and activations")
    nonfinite_limit: Count = Field(
        10, description="stop after so many steps in a row whose loss was not finite"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: Natural = Field(1234, description="of initial weights, data order and dropout")

    @model_validator(mode="after")
    def _stage_fits(self) -> "RecipeConfig":
        if self.window == 1:
            raise ValueError(
                "recipe.window=1 cannot be shifted by half of itself; use 0 or at least 2"
            )
        if self.window and self.stage == "image":
            raise ValueError(
                f"recipe.window={self.window} has no effect in stage image, which has no "
                "temporal channel; set recipe.window=0"
            )
        if self.stage == "interpolation" and not self.window:
            raise ValueError(
                "recipe.stage=interpolation needs a window (the published stage 2 has none "
                "without); set recipe.window, published value 10"
            )
        if self.stage == "image" and (self.base or self.start_from):
            raise ValueError(
                "recipe.base and recipe.start_from have no effect in stage image, which trains "
                "the base itself; remove them"
            )
        if list(self.frame_rates) != sorted(set(self.frame_rates)) or not self.frame_rates:
            raise ValueError(
                f"recipe.frame_rates={self.frame_rates} must rise and not repeat, as (1.0, 2.0)"
            )
        if self.stage == "keyframes" and self.min_fps > self.frame_rates[-1]:
            raise ValueError(
                f"recipe.min_fps={self.min_fps} leaves none of recipe.frame_rates="
                f"{self.frame_rates}; lower it to at most {self.frame_rates[-1]}"
            )
        return self


class ParallelConfig(Section):
    """How a run is laid out over processes: world size = pp x dp x tp, of which dp follows."""

    world_size: Natural = Field(
        0, description="processes that this layout is meant for; 0 takes what was started"
    )
    tp: Count = Field(1, description="tensor-parallel ranks: each holds a part of every layer")
    sequence_parallel: bool = Field(
        False, description="cut slots over tp too, where layers are not: less activation memory"
    )
    pp: Count = Field(1, description="pipeline stages: each holds some of the layers")
    virtual_stages: Count = Field(
        1,
        description="runs of layers that each pipeline rank holds; more than 1 interleaves them "
        "(interleaved 1F1B): a smaller bubble for more communication",
    )
    partition: tuple[Count, ...] | None = Field(
        None,
        description="layers of each of the pp x virtual_stages runs, the embedding counted in the "
        "first and the head in the last; by default runs have even FLOPs",
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        1,
        description="ZeRO stage: 1 cuts optimizer state, 2 gradients, 3 parameters too. With bf16, "
        "1 sums gradients over replicas in fp32, 2 and 3 in bf16, at each micro-batch",
    )
    offload_optimizer: bool = Field(
        False,
        description="keep optimizer state and float32 weights in host memory and update them there",
    )
    recompute: Recompute = Field(
        "layer",
        description="activation checkpointing: what of each layer the backward pass computes again "
        "instead of keeping it; mlp and attention are its halves, each with its two norms",
    )
    compile: bool = Field(
        False,
        description="fuse each layer's residual sums with the LayerNorms beside them, and the "
        "mixture's passes, by torch.compile, in training; off by default, since its speed on a GPU "
        "has not been measured",
    )
    reduce_bucket: Count = Field(
        100_000_000,
        description="elements per gradient-reduction bucket; with ZeRO 0, and with 1 in bf16, "
        "DeepSpeed has its own",
    )

    @model_validator(mode="after")
    def _pipeline_fits(self) -> "ParallelConfig":
        if self.pp == 1:
            for name in ("virtual_stages", "partition"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"parallel.{name}={getattr(self, name)} has no effect without a pipeline; "
                        "set parallel.pp to at least 2, or remove it"
                    )
        elif self.zero > 1:
            raise ValueError(
                f"parallel.zero={self.zero} cuts gradients that a pipeline (parallel.pp={self.pp}) "
                "adds up over micro-batches; use parallel.zero=1, or parallel.pp=1"
            )
        return self

    @model_validator(mode="after")
    def _offloading_fits(self) -> "ParallelConfig":
        if self.offload_optimizer and self.zero == 0:
            raise ValueError(
                "parallel.offload_optimizer=true moves ZeRO's optimizer state, and parallel.zero=0 "
                "has none; use parallel.zero=3, or remove it"
            )
        if self.offload_optimizer and self.pp > 1:
            raise ValueError(
                f"parallel.offload_optimizer=true does not work with a pipeline (parallel.pp="
                f"{self.pp}), which adds gradients up elsewhere; use parallel.pp=1, or remove it"
            )
        return self


class DataConfig(Section):
    """Where samples come from. The order is a function of recipe.seed and the position alone."""

    train: str = Field(description="folder or URL with shards and index of the training set")
    validation: str | None = Field(None, description="the same, for evaluation on held-out clips")
    text_tokenizer: str = Field(description="sentencepiece model; its hash must match the shards'")
    cache: str | None = Field(
        None,
        description="folder on a local disk for shards fetched from a URL, which stay there, and "
        "for the memory-mapped index, which otherwise lies beside the index",
    )
    window_shards: Count = Field(64, description="shards whose samples are mixed with each other")
    prefetch: Count = Field(64, description="samples read ahead")
    threads: Count = Field(2, description="reading threads")
    retries: Natural = Field(4, description="further tries after a transient read error")
    max_bad_share: Probability = Field(
        1e-4,
        description="stop when more than this share of the samples was damaged; judged once more "
        "than max_bad_in_row were",
    )
    max_bad_in_row: Count = Field(16, description="stop after so many damaged samples in a row")
    allow_commands: bool = Field(
        False, description="allow pipe: and other URLs that run a command on this machine"
    )


class RunConfig(Section):
    """Where results go and how often."""

    directory: str = Field(description="folder of this run: logs, metrics, checkpoints")
    log_every: Count = Field(10, description="steps between metric rows")
    evaluate_every: Natural = Field(0, description="steps between evaluations; 0 never evaluates")
    evaluate_samples: Count = Field(64, description="held-out samples of one evaluation")
    save_every: Natural = Field(
        1000, description="steps between checkpoints; 0 saves at the end only"
    )
    async_save: bool = Field(
        True,
        description="train on while a checkpoint is written, from a copy in host memory (12 bytes "
        "a trained parameter, shared by the ranks); false waits until it is committed",
    )
    keep_last: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Natural = Field(
        0, description="checkpoints whose step is a multiple of this are kept too; 0 keeps no more"
    )
    timeout_minutes: Positive = Field(30.0, description="longest wait for another rank")
    peak_tflops: Annotated[float, Field(ge=0)] = Field(
        0.0, description="peak matrix TFLOP/s of one device, for MFU; 0 looks the GPU up by name"
    )

    @model_validator(mode="after")
    def _saves_fit(self) -> "RunConfig":
        if self.save_every and self.keep_every % self.save_every:
            kept = math.lcm(self.save_every, self.keep_every)
            raise ValueError(
                f"run.keep_every={self.keep_every} would keep only every {kept}th step, of those "
                f"that run.save_every={self.save_every} saves; use a multiple of it"
            )
        return self


class Config(Section):
    """A whole run."""

    model: ModelConfig
    recipe: RecipeConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    run: RunConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        model, recipe = self.model, self.recipe
        if recipe.window and model.side % recipe.window:
            raise ValueError(
                f"recipe.window={recipe.window} does not divide model.side={model.side}; "
                f"use one of {_listed(_divisors(model.side)[1:])}"
            )
        if recipe.stage != "image" and model.frames < 2:
            raise ValueError(
                f"model.frames={model.frames} leaves nothing to learn in stage "
                f"{recipe.stage}; use at least 2"
            )
        self._check_tensor_parallel()
        self._check_pipeline()
        if self.run.evaluate_every and self.data.validation is None:
            raise ValueError(
                f"run.evaluate_every={self.run.evaluate_every} needs data.validation; name a "
                "folder of held-out shards, or set run.evaluate_every=0"
            )
        return self

    def _check_tensor_parallel(self) -> None:
        model, tp = self.model, self.parallel.tp
        if model.heads % tp:
            raise ValueError(
                f"parallel.tp={tp} does not divide model.heads={model.heads}; "
                f"use one of {_listed(_divisors(model.heads))}"
            )
        if not self.parallel.sequence_parallel:
            return
        if tp == 1:
            raise ValueError(
                "parallel.sequence_parallel=True has no effect with parallel.tp=1, where no layer "
                "is cut; set parallel.tp to at least 2, or parallel.sequence_parallel=False"
            )
        text, frames = model.text_slots, 1 if self.recipe.stage == "image" else model.frames
        image = frames * model.grid.tokens_per_frame
        if text % tp or image % tp:
            fits = [n for n in _divisors(model.heads) if n > 1 and text % n == image % n == 0]
            raise ValueError(
                f"parallel.sequence_parallel=True cannot cut model.text_slots={text} and the "
                f"{image} image slots of stage {self.recipe.stage} over parallel.tp={tp}; "
                + (f"use parallel.tp={_listed(fits)}, or " if fits else "")
                + "parallel.sequence_parallel=False"
            )

    def _check_pipeline(self) -> None:
        parallel, layers = self.parallel, self.model.layers
        if parallel.pp == 1:
            return
        if self.recipe.stage == "image":
            raise ValueError(
                f"parallel.pp={parallel.pp} would put the word table's two uses, embedding and "
                "head, on two stages, and stage image trains it; use parallel.pp=1 (tensor "
                "parallelism and ZeRO 3 cut this model too)"
            )
        runs = parallel.pp * parallel.virtual_stages
        if runs > layers:
            raise ValueError(
                f"parallel.pp={parallel.pp} x parallel.virtual_stages={parallel.virtual_stages} is "
                f"more than model.layers={layers}; lower one of them"
            )
        if parallel.partition is not None:
            self._check_partition(parallel.partition, runs)

    def _check_partition(self, partition: tuple[int, ...], runs: int) -> None:
        shown = f"parallel.partition={list(partition)}"
        if len(partition) != runs:
            raise ValueError(
                f"{shown} names {len(partition)} runs of layers, but parallel.pp="
                f"{self.parallel.pp} x parallel.virtual_stages={self.parallel.virtual_stages} has "
                f"{runs}; give {runs} numbers"
            )
        total = self.model.layers + 2
        if sum(partition) != total:
            raise ValueError(
                f"{shown} adds up to {sum(partition)}, but embedding, model.layers="
                f"{self.model.layers} and head are {total} layers; change it to add up to {total}"
            )
        if partition[0] == 1 or partition[-1] == 1:
            raise ValueError(
                f"{shown} leaves embedding or head alone in a run; give the first and the last run "
                "at least 2 layers"
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
