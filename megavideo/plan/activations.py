"""What autograd keeps for the backward pass, tensor by tensor, in bytes of one sample on one rank.

Read off the layers' code: a frozen linear keeps nothing, a trained one its input; LayerNorm keeps
its input, GELU its own, the mixture both channels. Checked against a count of saved tensors (see
tests/unit/plan/test_activations.py). Letters: h hidden, V image and T text slots, n heads.

Outside a tensor-parallel region slots are whole, or cut over tp under sequence parallelism; inside,
slots are whole and heads or units are cut (parallel/region.py).
"""

from dataclasses import dataclass

from megavideo.config.schema import Config
from megavideo.layout.render import blocks
from megavideo.layout.rules import Rule, loss_frames, spatial_rule, temporal_rule
from megavideo.model.build import stage_grid
from megavideo.model.recompute import SPANS, Sublayer

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT32 = 4
INT64 = 8


@dataclass(frozen=True)
class Kept:
    """Bytes of one sample on one tensor-parallel rank.

    Attributes:
        kept: from the forward pass to the backward pass of the layer.
        working: the most that the layer's backward pass needs beside it: what recomputation makes
            again, or gradients of logits.
    """

    kept: int
    working: int


class Ledger:
    """Adds up saved tensors of a model in a layout.

    Args:
        attention: backend of ops/backends.py.
        on_gpu: dropout keeps a byte an element there, and a float on a CPU.
    """

    def __init__(self, config: Config, attention: str, on_gpu: bool):
        self.model, self.recipe, self.parallel = config.model, config.recipe, config.parallel
        model, recipe, parallel = self.model, self.recipe, self.parallel
        self.attention = attention
        self.element = ELEMENT_BYTES[recipe.precision]
        self.zeros = 1 if on_gpu else self.element
        self.tp = parallel.tp
        self.outside = parallel.tp if parallel.sequence_parallel else 1
        self.grid = stage_grid(model, recipe.stage)
        self.base_trains = recipe.stage == "image"
        # DeepSpeed's linear of ZeRO 3 keeps its input whether or not the weight is trained.
        self.keeps_inputs = self.base_trains or parallel.zero == 3

    def layers(self) -> list[Kept]:
        """Of each layer of model/build.py's list."""
        blocks = self.model.layers
        # Odd and even blocks differ (shifted windows), and the last of a trained base.
        kinds = [(index % 2, index == blocks - 1) for index in range(blocks)]
        by_kind = {kind: self.block(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        return [self.embedding(), *(by_kind[kind] for kind in kinds), self.head()]

    def embedding(self) -> Kept:
        """Word rows and positions are looked up; dropout keeps its zeros."""
        slots = self.grid.image_tokens + (self.grid.text if self.base_trains else 0)
        indices = slots * INT64 * 2 if self.base_trains else 0
        return Kept(self._dropout(slots) + indices, 0)

    def block(self, layer: int) -> Kept:
        """A block's: of what is computed again, the inputs alone."""
        kept = working = 0
        inputs = self._states(self.grid.sequence, self.outside)
        differentiated = self.grid.sequence if self.base_trains else self.grid.image_tokens
        for span in SPANS[self.parallel.recompute]:
            whole = sum(self._sublayer(name, layer) for name in span.sublayers)
            kept += inputs if span.again else whole
            if span.again:  # the first norm keeps its input, which is there already
                working = max(working, whole - self._states(differentiated, self.outside))
        return Kept(kept, working)

    def head(self) -> Kept:
        """The last LayerNorm's input, and log-probabilities in float32.

        Backward, their gradient stands beside them in float32 and in the model's type.
        """
        slots = len(loss_frames(self.recipe.stage, self.grid.frames)) * self.grid.tokens_per_frame
        logits = slots * -(-self.model.image_codes // self.tp)
        kept = self._norm(self.grid.image_tokens) + logits * FLOAT32
        if self.base_trains:
            kept += self._states(slots)
        if self.tp > 1:
            kept += slots * (INT64 + 1)
        return Kept(kept, logits * (FLOAT32 + self.element))

    def boundary(self) -> int:
        """States that a pipeline stage sends on, kept until their gradient has come back."""
        return self._states(self.grid.sequence, self.outside)

    def _sublayer(self, sublayer: Sublayer, layer: int) -> int:
        """Of a sublayer that is not computed again."""
        if sublayer == "attention":
            return self._attention_half(layer) + (self._text_half(layer) if self.base_trains else 0)
        text_goes_on = self.base_trains and layer < self.model.layers - 1
        of_text = self._mlp_half(self.grid.text) if text_goes_on else 0
        return self._mlp_half(self.grid.image_tokens) + of_text

    def _attention_half(self, layer: int) -> int:
        """The norm before attention, both channels on images, and the norm behind it."""
        grid, recipe = self.grid, self.recipe
        image, text_stays = grid.image_tokens, self._keeps_text_attention(layer)
        spatial = spatial_rule(grid, recipe.stage)
        kept = self._norm(image) + self._attention(spatial, self.keeps_inputs, text_stays)
        if not self.base_trains:
            rule = temporal_rule(grid, recipe.stage, recipe.window, layer)
            kept += self._entered(grid.sequence) + self._attention(rule, True, text_stays)
            # The mixture keeps both channels' outputs; compiled, the difference between them.
            kept += (1 if self.parallel.compile else 2) * self._states(image)
        else:
            kept += self._entered(image)
        return kept + self._norm(self._left(image))

    def _mlp_half(self, slots: int) -> int:
        """The norm before the MLP, GELU, and the norm behind it."""
        kept = self._norm(slots) + self._states(slots, self.tp) * 4  # of GELU
        if self.keeps_inputs:
            kept += self._entered(slots) + 4 * self._states(slots, self.tp)
        if self.recipe.hidden_dropout:
            return kept + self._dropout(slots) + self._norm(slots)
        return kept + self._norm(self._left(slots))

    def _attention(self, rule: Rule, trained: bool, text_stays: bool) -> int:
        """Of one channel on images: packed projections, log-sum-exp, and what the backend adds."""
        image, text = self.grid.image_tokens, self.grid.text
        # Frozen text's keys and values are a view of its packed queries, keys and values.
        of_text = self._states(text, self.tp) * (3 if rule.own_frame else 2)
        out = self._states(image, self.tp)
        statistics = image * self.model.heads // self.tp * FLOAT32
        packed = 3 * self._states(image, self.tp)
        kept = packed + of_text + statistics + (out if trained else 0)
        if self.attention == "library":
            return kept + (0 if trained else out)
        copied = 0 if text_stays else of_text
        if self.attention == "sdpa":
            return kept + self._sdpa(rule) + out - copied - packed
        if self.attention == "flex":  # read off ops/flex.py: it has no backward pass on a CPU
            return kept + 2 * self._states(text + image, self.tp) + out - copied
        return kept

    def _sdpa(self, rule: Rule) -> int:
        """Queries in block order, keys and values of each block with text, and its mask."""
        text, sizes = self.grid.text, [len(block.slots) for block in blocks(rule)]
        keys = sum(2 * self._states(text + n, self.tp) for n in sizes)
        masks = sum(n * (text + n) for n in sizes) * self.element
        return 3 * self._states(self.grid.image_tokens, self.tp) + keys + masks

    def _text_half(self, layer: int) -> int:
        """The attention half of trained text."""
        text = self.grid.text
        kept = self._norm(text) + self._entered(text)
        if not self._keeps_text_attention(layer):
            return kept
        statistics = text * self.model.heads // self.tp * FLOAT32
        kept += self._states(text, self.tp) + statistics + text * self.element  # the mask
        return kept + self._norm(self._left(text))

    def _keeps_text_attention(self, layer: int) -> bool:
        """Whether text is trained and more of it matters than keys and values.

        Not in the last layer; but an MLP half that is computed again keeps the text that enters it,
        and so everything that it came from.
        """
        last = layer == self.model.layers - 1
        return self.base_trains and (not last or self.parallel.recompute == "mlp")

    def _entered(self, slots: int) -> int:
        """A trained linear's input inside a region: all slots."""
        return self._states(slots)

    def _left(self, slots: int) -> int:
        """Slots in a region's result: one collective carries images and text in one buffer."""
        return self.grid.sequence if self.tp > 1 and slots == self.grid.image_tokens else slots

    def _norm(self, slots: int) -> int:
        """A LayerNorm's input and its two statistics, outside."""
        return self._states(slots, self.outside) + 2 * slots * FLOAT32 // self.outside

    def _dropout(self, slots: int) -> int:
        if not self.recipe.hidden_dropout:
            return 0
        return slots * self.model.hidden * self.zeros // self.outside

    def _states(self, slots: int, parts: int = 1) -> int:
        return slots * self.model.hidden * self.element // parts
