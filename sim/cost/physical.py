"""From shapes and datasheets to a step's time: the roofline, and the same with what software reaches of it. Data plane.

Each part of a step takes the longer of its arithmetic at the device's peak and its bytes at the memory's bandwidth
(Williams et al., CACM 2009). A few coefficients, each with a physical bound, say how far from that a real engine
stays: shares of the peaks, in (0, 1], and times that come on top, at least 0. So no step is faster than the roofline,
and none gets faster for more tokens, context or requests.

A prompt chunk and a single token follow one formula, summed over requests; a chunk of one token costs what a decode
costs. Decodes enter by their sums alone: for all of them the same side of the roof is the longer one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from lab.control.plan import Decoding, StepPlan, StepTiming, Work
from lab.errors import ConfigError
from sim.cost.terms import StepCost
from sim.hardware import Hardware, Link
from sim.model_shape import LayerKind, ModelShape


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What an engine reaches of a device's peaks, and what it adds."""

    weight_read: float = 0.905
    """Share of the memory's bandwidth at which weights are read."""
    kv_read: float = 0.86
    """The same of KV."""
    mfu: float = 0.70
    """Share of the peak arithmetic."""
    link: float = 0.329
    """Share of the link's bandwidth that an all-reduce sees: 148 of NVLink's 450 GB/s."""
    layer_us: float = 44.2
    """Launching one layer."""
    sequence_us: float = 6.4
    """Preparing one request's part of a batch."""
    step_us: float = 0.0
    """Preparing a step."""
    collective_us: float = 8.8
    """Launching one collective."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_us"):
                if not 0 <= value < float("inf"):
                    raise ConfigError(f"cost.{field.name} is {value}; expected a finite number, at least 0.")
            elif not 0 < value <= 1:
                raise ConfigError(f"cost.{field.name} is {value}; expected a share above 0, at most 1.")


MEASURED = Coefficients()
"""Measured on an H100 with vLLM 0.15."""
PERFECT = Coefficients(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""The roofline itself."""

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Rows for which vLLM records CUDA graphs; a smaller batch is padded to the next of them."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a model is laid over devices: shares of each layer, runs of layers, and parts a batch is cut into so that
    the runs have something to do at once.

    Experts can lie another way than the rest of their layer. With more devices for experts than share a layer, groups
    of `tensor` devices each serve their own part of the requests (attention data parallel); with fewer, each expert is
    cut too.
    """

    tensor: int = 1
    """Devices that share each layer: attention, dense blocks, shared experts and the head."""
    pipeline: int = 1
    microbatches: int = 1
    expert: int = 1
    """Parts that the experts of each layer are shared out in, each expert whole in one of them."""
    imbalance: float = 1.0
    """Of the experts' work, the busiest device's share over the mean; nothing where they aren't shared out."""

    @property
    def stage(self) -> int:
        """Devices that have the same layers."""
        return max(self.tensor, self.expert)

    @property
    def devices(self) -> int:
        return self.stage * self.pipeline

    @property
    def groups(self) -> int:
        """Of `tensor` devices each, with requests of their own, and weights of their own for all but the experts."""
        return self.stage // self.tensor

    @property
    def expert_cut(self) -> int:
        """Devices that share one expert."""
        return self.stage // self.expert

    @property
    def skew(self) -> float:
        """The busiest device's part of the experts' work over the mean."""
        return self.imbalance if self.expert > 1 else 1.0

    def check(self, shape: ModelShape) -> None:
        """Raises `ConfigError` where the model can't be cut like that."""
        if shape.heads % self.tensor:
            raise ConfigError(
                f"each layer is shared by {self.tensor} devices (cost.tensor_parallel, or the tp of a topology's "
                f"group), and {shape.name} has {shape.heads} query heads; expected a divisor of that."
            )
        if self.pipeline > shape.layers:
            raise ConfigError(
                f"there are {self.pipeline} stages (cost.pipeline_parallel, or the pp of a topology's group), and "
                f"{shape.name} has {shape.layers} layers; expected at most as many."
            )

        if self.expert == 1:
            return
        count = shape.mixture.count if shape.mixture else 0
        if not count or count % self.expert:
            raise ConfigError(
                f"experts are shared out over {self.expert} devices, and {shape.name} has {count or 'no'} experts; "
                "expected a divisor of their number."
            )
        if self.stage % self.tensor or self.stage % self.expert:
            raise ConfigError(
                f"experts are shared out over {self.expert} devices where {self.tensor} share each layer; expected ep "
                "to be a multiple or a divisor of tp."
            )
        if shape.mixture and shape.mixture.size % self.expert_cut:
            raise ConfigError(
                f"each expert of {shape.name} would be cut in {self.expert_cut} parts (tp={self.tensor} over "
                f"ep={self.expert}), and is {shape.mixture.size} wide; expected a divisor of that."
            )

    def weight_bytes(self, shape: ModelShape) -> float:
        """What each device holds of the weights."""
        if self.expert == 1:
            return shape.weight_bytes / self.devices
        experts = shape.expert_bytes
        return (shape.weight_bytes - experts) / (self.tensor * self.pipeline) + experts / self.devices

    def head_share(self, shape: ModelShape) -> float:
        """Of one request's KV in a layer, what each device of its group holds: heads can't be cut, and a latent vector
        is everybody's."""
        if shape.mla is not None:
            return 1.0
        return -(-shape.kv_heads // self.tensor) / shape.kv_heads

    def kv_share(self, shape: ModelShape) -> float:
        """The same of all requests' KV: groups that serve requests of their own hold theirs alone."""
        return self.head_share(shape) / self.groups


ALONE = Parallel()
"""One device."""


class PhysicalCost:
    """Implements `CostModel`, with `decode_time`. Terms in `step_cost`."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        coefficients: Coefficients = MEASURED,
        parallel: Parallel = ALONE,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        parallel.check(shape)
        self.shape, self.hardware, self.coefficients, self.parallel = shape, hardware, coefficients, parallel
        self._graphs = list(graph_sizes)
        c, tensor = coefficients, parallel.tensor
        arithmetic = shape.weights if shape.weights in ("fp8",) else shape.dtype
        flops = hardware.peak(arithmetic) * c.mfu
        self._flops_s = hardware.peak(shape.dtype) * c.mfu
        self._weights_s = hardware.memory_bytes_s * c.weight_read
        self._kv_s = hardware.memory_bytes_s * c.kv_read
        dense = sum(kind.count * shape.linear(False) for kind in shape.kinds if not kind.sparse)
        sparse = sum(kind.count for kind in shape.kinds if kind.sparse)
        dense += sparse * (shape.attention_linear + shape.always_linear)
        width = shape.weight_width / tensor
        self._dense = (2 * dense / tensor / flops, dense * width / self._weights_s)
        """Seconds of arithmetic a row, and seconds of reading."""
        per_token = shape.mixture.per_token if shape.mixture else 0
        experts = sparse * shape.expert_linear
        cut = parallel.expert_cut
        self._experts = (
            2 * experts * per_token / cut / flops,
            experts * (shape.weight_width / cut) / self._weights_s,
        )
        """The same; reading is for one expert of each layer."""
        head = shape.head_linear / tensor
        self._head = (2 * head / self._flops_s, head * shape.width / self._weights_s)
        share = parallel.head_share(shape)
        self._pair_s = shape.pair_flops / tensor / self._flops_s
        self._key_s = shape.kv_layer_bytes * share / self._kv_s
        self.token_s = max(self._pair_s, self._key_s)
        """One single token's attention to one token of its context, in one layer."""
        stage = -(-shape.layers // parallel.pipeline) / shape.layers
        self._rounds = (parallel.microbatches + parallel.pipeline - 1) * stage
        """How often all layers' time passes in a step, for one microbatch."""
        self._tensor_link = self._link_for(tensor)
        self._expert_link = self._link_for(parallel.stage)
        self._stage_link = self._link_for(parallel.devices)

    def _link_for(self, devices: int) -> Link:
        return self.hardware.link if devices <= self.hardware.devices_per_node else self.hardware.network

    # -- the interface ---------------------------------------------------------------------------------

    def step_time(self, plan: StepPlan) -> StepTiming:
        return self.step_cost(plan).timing()

    def decode_time(self, decodes: Decoding) -> StepTiming:
        """The same of a step that is nothing but these decodes."""
        return self.cost_of(decodes, ()).timing()

    def step_cost(self, plan: StepPlan) -> StepCost:
        """A step's terms, in seconds."""
        return self.cost_of(plan.decodes, plan.items)

    def cost_of(self, decodes: Decoding, items: Sequence[Work]) -> StepCost:
        """The same of decodes given as sums, and of work items beside them."""
        rows = seqs = decodes.seqs
        for item in items:
            rows += item.tokens
        seqs += len(items)
        if not rows:
            return StepCost()
        attention, kv_read = self.attention(decodes, items)
        microbatches, groups = self.parallel.microbatches, self.parallel.groups
        # Requests are shared out evenly.
        attention, kv_read, seqs_each = attention / groups, kv_read / groups, -(-seqs // groups)
        weights = self.linear(self.padded(rows) / microbatches) * self._rounds
        weights += self.head(seqs_each / microbatches) * microbatches
        ratio = self._rounds / microbatches
        c = self.coefficients
        host = c.layer_us * self.shape.layers * self._rounds + c.sequence_us * seqs + c.step_us
        return StepCost(
            weights=weights,
            attention=attention * ratio,
            kv_read=kv_read * ratio,
            collectives=self.collectives(rows, seqs) if self.parallel.devices > 1 else 0.0,
            host=host * 1e-6,
        )

    # -- parts, for all layers and one device's share ----------------------------------------------------

    def padded(self, rows: int) -> int:
        """Rows of the recorded graph that a batch runs in."""
        if not self._graphs or rows > self._graphs[-1]:
            return rows
        return self._graphs[bisect.bisect_left(self._graphs, rows)]

    def linear(self, rows: float) -> float:
        """All linear layers, for this many tokens."""
        return self.dense_time(rows / self.parallel.groups) + self.expert_time(rows)

    def dense_time(self, rows: float) -> float:
        """The same but for the experts, of one group's tokens."""
        per_row, reading = self._dense
        return max(rows * per_row, reading)

    def expert_time(self, rows: float) -> float:
        """All mixtures of experts: those that this many tokens are expected to touch are read once."""
        if self.shape.mixture is None:
            return 0.0
        per_row, reading = self._experts
        each = self.parallel.skew / self.parallel.expert  # the busiest device's part
        own = self.shape.mixture.count / self.parallel.expert  # it has no more of them to read
        return max(rows * per_row * each, min(self.shape.mixture.touched(rows) * each, own) * reading)

    def head(self, seqs: float) -> float:
        """The LM head: one row a request, whether its token is wanted or not (as in vLLM)."""
        per_row, reading = self._head
        return max(seqs * per_row, reading)

    def attention(self, decodes: Decoding, items: Sequence[Work]) -> tuple[float, float]:
        """(of chunks, of single tokens)."""
        chunks = tokens = 0.0
        for kind in self.shape.kinds:
            window = kind.window
            single = float(decodes.context)
            if window is not None and decodes.longest > window:
                single = min(single, decodes.seqs * window)  # each of them at most; exact if all are beyond
            for item in items:
                n, end = item.tokens, item.context
                if n == 1:
                    single += end if window is None else min(end, window)
                else:
                    chunks += kind.count * self.chunk_s(n, end, kind)
            tokens += kind.count * single * self.token_s
        return chunks, tokens

    def chunk_s(self, tokens: int, end: int, kind: LayerKind) -> float:
        """One layer's attention of a chunk: its pairs' arithmetic, or reading its context once."""
        pairs, keys = pairs_within(tokens, end, kind.window)
        return max(pairs * self._pair_s, keys * self._key_s)

    def collectives(self, rows: int, seqs: int) -> float:
        """Waiting for other devices: those that share each layer, the next stage, and those that hold experts.

        All-reduces follow attention and feed-forward of every layer; the head's logits are gathered. Where groups have
        requests of their own, tokens go to the devices of their experts and back (two all-to-alls); before that, each
        device of a group keeps its part of the tokens (a reduce-scatter), and afterwards it gets the others' (an
        all-gather): together one all-reduce.
        """
        shape, parallel = self.shape, self.parallel
        hidden, width, groups = shape.hidden, shape.width, parallel.groups
        launch = self.launch_s
        took = 0.0
        part = rows / parallel.microbatches
        own = part / groups
        apart = sum(kind.count for kind in shape.kinds if kind.sparse) if groups > 1 else 0
        if parallel.tensor > 1:
            moved = self.reduce_s(own * hidden * width)
            gather = launch + self.reduce_s(-(-seqs // groups) * shape.vocab * width / 2)
            took += 2 * (shape.layers - apart) * self._rounds * (launch + moved) + gather
            took += apart * self._rounds * (2 * launch + moved)
        if parallel.pipeline > 1:
            link = self._stage_link
            sends = parallel.microbatches + parallel.pipeline - 2
            took += sends * (max(launch, link.latency_s) + own * hidden * width / link.bytes_s)
        if apart:
            each = max(launch, self._expert_link.latency_s) + self.dispatch_s(part)
            took += 2 * apart * self._rounds * each
        return took

    def dispatch_bytes(self, rows: float) -> float:
        """What one device sends to others before, and gets back after, one layer's experts: each of its tokens once
        for each chosen expert that lies elsewhere."""
        expert, mixture = self.parallel.expert, self.shape.mixture
        if mixture is None:
            return 0.0
        chosen = rows / expert * mixture.per_token
        return chosen * (expert - 1) / expert * self.shape.hidden * self.shape.width

    def dispatch_s(self, rows: float) -> float:
        """One all-to-all: as long as the busiest device's."""
        busiest = self.dispatch_bytes(rows) * self.parallel.skew
        return busiest / (self._expert_link.bytes_s * self.coefficients.link)

    @property
    def launch_s(self) -> float:
        """Launching one collective."""
        return self.coefficients.collective_us * 1e-6

    def reduce_s(self, size: float) -> float:
        """Moving the data of one all-reduce: never less than a ring needs, which moves 2 (n - 1) / n of it."""
        link, tensor = self._tensor_link, self.parallel.tensor
        ring = 2 * (tensor - 1) / tensor
        return size * max(ring, 1 / self.coefficients.link) / link.bytes_s

    def roofline(self) -> PhysicalCost:
        """The bound below all that this model says: the same layout at the peaks, unpadded."""
        return PhysicalCost(self.shape, self.hardware, PERFECT, self.parallel)

    def efficiency(self, plan: StepPlan) -> float:
        """Share of the roofline that a step reaches, in (0, 1]."""
        return self.roofline().step_cost(plan).total / self.step_cost(plan).total

    def of_layers(self, count: int) -> PhysicalCost:
        """The same model cut to its first kind of layer, `count` times."""
        shape = replace(self.shape, kinds=(replace(self.shape.kinds[0], count=count),))
        return PhysicalCost(shape, self.hardware, self.coefficients, self.parallel, self._graphs)


def pairs_within(tokens: int, end: int, window: int | None) -> tuple[int, int]:
    """(query-key pairs, keys read) of a causal chunk of so many tokens whose last attends to `end` tokens."""
    start = end - tokens
    if window is None or end <= window:
        return tokens * start + tokens * (tokens + 1) // 2, end
    full = min(tokens, end - window)  # queries that see a whole window
    rising = tokens - full
    return full * window + rising * start + rising * (rising + 1) // 2, min(end, window + tokens - 1)
