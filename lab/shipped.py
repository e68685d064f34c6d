"""What can be plugged in, and what ships: by kind the entry-point group, the base class, the names. Control plane.

The same names stand among the distribution's entry points in `pyproject.toml`; with this table a checkout that isn't
installed works too. A test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lab.policy import (
    AdmissionPolicy,
    CompressionPolicy,
    EvictionPolicy,
    LengthPredictor,
    PreemptionPolicy,
    RoutingPolicy,
    ScalingPolicy,
    SchedulingPolicy,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One seam: its entry-point group, the base class plug-ins must have (None: any), those that ship."""

    group: str
    base: type | None
    builtin: Mapping[str, str]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "policy": Kind(
            "diptych.scheduling",
            SchedulingPolicy,
            {
                "fcfs": "policies.scheduling.fcfs:Fcfs",
                "prefill_first": "policies.scheduling.prefill_first:PrefillFirst",
                "sjf": "policies.scheduling.sjf:ShortestJobFirst",
                "priority": "policies.scheduling.priority:Priority",
                "edf": "policies.scheduling.edf:EarliestDeadlineFirst",
                "vllm_v0": "policies.scheduling.prefill_first:PrefillFirst",
                "vllm_v1": "policies.scheduling.vllm_v1:VllmV1",
                "orca": "policies.scheduling.orca:Orca",
                "sarathi": "policies.scheduling.sarathi:Sarathi",
                "srpt": "policies.scheduling.srpt:ShortestRemaining",
                "psjf": "policies.scheduling.psjf:PreemptiveShortestJob",
                "spf": "policies.scheduling.spf:ShortestPromptFirst",
                "hrrn": "policies.scheduling.hrrn:HighestResponseRatio",
                "mlfq": "policies.scheduling.mlfq:Mlfq",
                "ltr": "policies.scheduling.ltr:LearningToRank",
                "mc_sf": "policies.scheduling.mc_sf:MemoryConstrainedShortest",
                "least_slack": "policies.scheduling.least_slack:LeastSlack",
                "andes": "policies.scheduling.andes:Andes",
                "vtc": "policies.scheduling.vtc:VirtualTokenCounter",
                "drr": "policies.scheduling.drr:DeficitRoundRobin",
                "lpm": "policies.scheduling.lpm:LongestPrefixMatch",
                "dlpm": "policies.scheduling.dlpm:DeficitPrefixMatch",
            },
        ),
        "eviction": Kind(
            "diptych.eviction",
            EvictionPolicy,
            {
                "lru": "policies.eviction.lru:Lru",
                "fifo": "policies.eviction.fifo:Fifo",
                "lfu": "policies.eviction.lfu:Lfu",
                "lru_head": "policies.eviction.lru_head:LruHead",
                "radix_lru": "policies.eviction.radix_lru:RadixLru",
                "clock": "policies.eviction.clock:Clock",
                "lfu_perfect": "policies.eviction.lfu_perfect:LfuPerfect",
                "2q": "policies.eviction.two_q:TwoQ",
                "arc": "policies.eviction.arc:Arc",
                "s3fifo": "policies.eviction.s3fifo:S3Fifo",
                "sieve": "policies.eviction.sieve:Sieve",
                "gdsf": "policies.eviction.gdsf:Gdsf",
                "ttl": "policies.eviction.ttl:Ttl",
                "t_lru": "policies.eviction.t_lru:TailLru",
                "length_aware": "policies.eviction.length_aware:LengthAware",
                "workload_aware": "policies.eviction.workload_aware:WorkloadAware",
                "belady": "policies.eviction.belady:Belady",
            },
        ),
        "compression": Kind(
            "diptych.compression",
            CompressionPolicy,
            {
                "none": "policies.compression.none:Nothing",
                "streaming_llm": "policies.compression.streaming_llm:StreamingLlm",
                "knorm": "policies.compression.knorm:KeyNorm",
                "tova": "policies.compression.tova:Tova",
            },
        ),
        "admission": Kind(
            "diptych.admission",
            AdmissionPolicy,
            {
                "always": "policies.admission.always:Always",
                "token_bucket": "policies.admission.token_bucket:TokenBucket",
                "quota": "policies.admission.quota:Quota",
                "kv_watermark": "policies.admission.kv_watermark:KvWatermark",
                "aimd": "policies.admission.aimd:Aimd",
                "gradient2": "policies.admission.gradient2:Gradient2",
                "slo_reject": "policies.admission.slo_reject:SloReject",
            },
        ),
        "routing": Kind(
            "diptych.routing",
            RoutingPolicy,
            {
                "single": "policies.routing.single:Single",
                "round_robin": "policies.routing.round_robin:RoundRobin",
                "random": "policies.routing.random:Random",
                "least_requests": "policies.routing.least_requests:LeastRequests",
                "least_tokens": "policies.routing.least_tokens:LeastTokens",
                "power_of_two": "policies.routing.power_of_two:PowerOfTwo",
                "session_affinity": "policies.routing.session_affinity:SessionAffinity",
                "consistent_hash": "policies.routing.consistent_hash:ConsistentHash",
                "prefix_cost": "policies.routing.prefix_cost:PrefixCost",
                "lmetric": "policies.routing.lmetric:LMetric",
            },
        ),
        "scaling": Kind(
            "diptych.scaling",
            ScalingPolicy,
            {
                "fixed": "policies.scaling.fixed:Fixed",
                "queue_threshold": "policies.scaling.queue_threshold:QueueThreshold",
                "concurrency": "policies.scaling.concurrency:Concurrency",
                "slo": "policies.scaling.slo:Slo",
            },
        ),
        "predictor": Kind(
            "diptych.prediction",
            LengthPredictor,
            {
                "oracle": "policies.prediction.oracle:Oracle",
                "noisy": "policies.prediction.noisy:Noisy",
                "bucket": "policies.prediction.bucket:Bucket",
                "constant": "policies.prediction.constant:Constant",
                "online": "policies.prediction.online:Online",
            },
        ),
        "preemption": Kind(
            "diptych.preemption",
            PreemptionPolicy,
            {
                "last": "policies.preemption.last:Last",
                "lowest_priority": "policies.preemption.lowest_priority:LowestPriority",
                "largest_kv": "policies.preemption.largest_kv:LargestKv",
                "least_progress": "policies.preemption.least_progress:LeastProgress",
                "cost_benefit": "policies.preemption.cost_benefit:CostBenefit",
            },
        ),
        "backend": Kind(
            "diptych.backend",
            None,
            {"real": "real_engine.backend:open_backend", "sim": "sim.backend:open_backend"},
        ),
        "diagnosis": Kind("diptych.diagnosis", None, {"real": "real_engine.doctor:diagnose"}),
        "trace_registry": Kind("diptych.trace_registry", None, {"builtin": "traces.registry:TRACES"}),
    }
)
"""Kinds that are also configuration groups carry the group's name."""
