"""Which part of a model a process holds, as the decoder sees it. Data plane; request path.

Tensor parallel as in Megatron (Shoeybi et al., arXiv:1909.08053): attention is cut by KV heads and the feed-forward
block (each expert's, too) by width, so that the products before the cut split by rows of their weights, those after it
by columns, and one sum over the ranks follows each of the two. The head is cut by rows of the vocabulary. Pipeline
parallel as in GPipe (Huang et al., arXiv:1811.06965): each stage holds a run of layers and hands the residual
stream on.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

from lab.errors import ConfigError
from real_engine.models.config import DecoderConfig
from real_engine.models.weights import Weights

_BY_ROWS = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3)\.(weight|bias)$")
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj|w2)\.(weight|bias)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """One rank among `tensor * pipeline`: tensor-parallel neighbours have neighbouring numbers."""

    rank: int = 0
    tensor: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    @property
    def part(self) -> int:
        """Which cut of its layers it holds, `0 .. tensor`."""
        return self.rank % self.tensor

    @property
    def stage(self) -> int:
        """Which run of layers it holds, `0 .. pipeline`."""
        return self.rank // self.tensor

    @property
    def first(self) -> bool:
        """Whether tokens enter here."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether logits come out here."""
        return self.stage == self.pipeline - 1

    def layers(self, count: int) -> range:
        """Its run of `count` layers; what doesn't divide goes to the first stages."""
        each, more = divmod(count, self.pipeline)
        start = self.stage * each + min(self.stage, more)
        return range(start, start + each + (self.stage < more))


class Shard:
    """A whole model in one process: nothing is cut, and there is nobody to talk to. `place.world` others override."""

    place = Place()

    @property
    def alone(self) -> bool:
        return self.place.world == 1

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """What this rank computes. Raises `ConfigError` if the model can't be cut so; asks nobody."""
        place, experts = self.place, config.experts
        tensor = f"engine.tensor_parallel is {place.tensor}"
        for what, size in (
            ("query heads", config.heads),
            ("KV heads", config.kv_heads),
            ("feed-forward width", config.intermediate_size),
            ("tokens in the vocabulary", config.vocab_size),
            ("width of an expert", experts.intermediate_size if experts else 0),
            ("width of the shared expert", (experts.shared_size or 0) if experts else 0),
        ):
            if size % place.tensor:
                raise ConfigError(
                    f"{tensor} and doesn't divide the model's {what}, {size}; expected a divisor of it."
                )
        if place.pipeline > config.layers:
            raise ConfigError(
                f"engine.pipeline_parallel is {place.pipeline}, and the model has {config.layers} layers; expected "
                "at most as many stages."
            )
        if experts is not None:
            experts = dataclasses.replace(
                experts,
                intermediate_size=experts.intermediate_size // place.tensor,
                shared_size=None if experts.shared_size is None else experts.shared_size // place.tensor,
            )
        return dataclasses.replace(
            config,
            layers=len(place.layers(config.layers)),
            heads=config.heads // place.tensor,
            kv_heads=config.kv_heads // place.tensor,
            intermediate_size=config.intermediate_size // place.tensor,
            experts=experts,
        )

    def weights(self, weights: Weights) -> Weights:
        """Gives tensors as large as `config` says, out of the whole model's."""
        return weights if self.place.tensor == 1 else _Cut(weights, self.place)

    def head(self, weight: Tensor) -> Tensor:
        """This rank's rows of the head, `[vocab, hidden]`."""
        return weight.chunk(self.place.tensor)[self.place.part]

    def sum_(self, x: Tensor) -> Tensor:
        """`x`, summed over the ranks that hold parts of the same layers, in place."""
        return x

    def receive(self, tokens: int, width: int, like: Tensor) -> Tensor:
        """The residual stream from the stage before, `[tokens, width]` of `like`'s type and device."""
        raise AssertionError("the first stage receives nothing")

    def send(self, x: Tensor) -> None:
        """Hand the residual stream on to the next stage."""
        raise AssertionError("the last stage sends nothing")

    def gather(self, logits: Tensor) -> Tensor:
        """`[rows, vocab]`, for whoever draws, from the `[rows, vocab / tensor]` that each has; others get their own."""
        return logits


ALONE = Shard()


class _Cut:
    """Implements `Weights`: asked for a tensor of this rank's size, takes the whole one and cuts it."""

    def __init__(self, weights: Weights, place: Place) -> None:
        self._weights, self._place = weights, place

    def take(self, name: str, *shape: int) -> Tensor:
        place, whole = self._place, list(shape)
        if _BY_ROWS.search(name):
            axis = 0
        elif _BY_COLUMNS.search(name) is None:
            return self._weights.take(name, *shape)
        elif name.endswith(".bias"):  # what is summed over the ranks adds it once
            bias = self._weights.take(name, *shape)
            return bias if place.part == 0 else torch.zeros_like(bias)
        else:
            axis = 1
        whole[axis] *= place.tensor
        return self._weights.take(name, *whole).chunk(place.tensor, axis)[place.part].contiguous()
