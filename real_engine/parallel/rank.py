"""What one rank executes: its part of the model under the same plans as all others. Data plane; request path.

Each rank keeps all sequences and block tables, since each gets the whole plan; weights and KV are its own part. The
tokens are drawn once, by the rank that has the logits, and told to the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lab.control.plan import GENESIS, RankTiming, StepPlan, StepResult, TokenLogprobs, digest_of
from lab.control.request import RequestId, SamplingParams
from lab.errors import ExecutorError
from real_engine.executor import TorchExecutor
from real_engine.models.decoder import Decoder
from real_engine.parallel.group import RankShard


class RankExecutor(TorchExecutor):
    """A `TorchExecutor` over a part of a model. `execute` returns the same tokens on every rank."""

    digest = GENESIS
    """Of all plans executed so far, from what came to this rank: the same on every rank."""

    def follow(self, plan: StepPlan) -> tuple[StepResult, RankTiming]:
        """Execute, and account for it."""
        shard = self.shard
        scored = next((item.rule for item in plan.compactions if item.rule), None)
        if scored is not None and shard.place.tensor > 1:
            raise ExecutorError(
                f"step {plan.index}: compression={scored} scores the keys of all heads together, and "
                f"engine.tensor_parallel={shard.place.tensor} holds them apart; expected engine.tensor_parallel=1"
            )
        before = shard.communication_ns
        result = self.execute(plan)
        self.digest = digest_of(self.digest, plan)
        place = shard.place
        timing = RankTiming(
            rank=place.rank,
            tensor=place.part,
            pipeline=place.stage,
            prepare_ns=result.prepare_ns,
            forward_ns=result.forward_ns,
            sample_ns=result.sample_ns,
            transfer_ns=result.transfer_ns,
            compact_ns=result.compact_ns,
            communication_ns=shard.communication_ns - before,
        )
        return result, timing

    @property
    def shard(self) -> RankShard:
        decoder = self.model.decoder
        assert isinstance(decoder, Decoder)
        shard = decoder.shard
        assert isinstance(shard, RankShard)
        return shard

    def _draw(
        self,
        logits: Tensor,
        requests: Sequence[RequestId],
        params: Sequence[SamplingParams],
        positions: Sequence[int],
    ) -> tuple[list[int], Mapping[RequestId, TokenLogprobs]]:
        tokens: list[int] = []
        logprobs: Mapping[RequestId, TokenLogprobs] = {}
        if not requests:
            return tokens, logprobs
        if self.shard.draws:
            tokens, logprobs = super()._draw(logits, requests, params, positions)
        tokens = self.shard.share(tokens, len(requests))
        if len(tokens) != len(requests):
            raise ExecutorError(f"{len(tokens)} tokens came for {len(requests)} requests")
        return tokens, logprobs

    def close(self) -> None:
        super().close()
        self.shard.close()
