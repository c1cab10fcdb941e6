"""The drawings of the course, one module for each idea; labels and sizes come from a config.

`DRAWINGS` names every drawing, as a function without arguments: the tests look at all of them.
"""

from collections.abc import Callable
from functools import partial

from minids.config import ModelConfig
from minids.course.diagrams import Diagram
from minids.course.drawings.attention import attention_kinds
from minids.course.drawings.balance import balance_loop
from minids.course.drawings.bill import bill
from minids.course.drawings.block import pre_norm_block
from minids.course.drawings.dispatch import dispatch
from minids.course.drawings.distillation_ways import distillation_ways
from minids.course.drawings.engram import engram
from minids.course.drawings.fp8_flow import fp8_flow
from minids.course.drawings.fp8_tiles import fp8_retile, fp8_tiles
from minids.course.drawings.hyper_connections import hyper_connections
from minids.course.drawings.mesh import mesh
from minids.course.drawings.mla import lookup_task, mla_absorbed, mla_expanded
from minids.course.drawings.moe import moe_layers
from minids.course.drawings.mtp import mtp_chain
from minids.course.drawings.pipeline import bubble, dual, fold
from minids.course.drawings.r1_stages import distillation, r1_stages
from minids.course.drawings.recompute import recompute
from minids.course.drawings.rl_loop import ppo_and_grpo, rl_loop
from minids.course.drawings.rope import rope_distance, rope_pairs
from minids.course.drawings.sandbox import sandbox
from minids.course.drawings.sparse_attention import compressed, csa_entries, indexer, training_stages
from minids.course.drawings.speculative import speculative_round
from minids.course.drawings.training import packing, training_step
from minids.course.drawings.v3_map import CHAPTERS, v3_map
from minids.course.drawings.verifier import verifier

_FOUR_HEADS = ModelConfig.preset("nano", attention="gqa", num_key_value_heads=2, first_k_dense_replace=3)
DRAWINGS: dict[str, Callable[[], Diagram]] = {
    **{f"map: {part}": partial(v3_map, part) for part in CHAPTERS},
    "training step": training_step,
    "packing": packing,
    "speculative round": speculative_round,
    "RoPE distance": rope_distance,
    "RoPE pairs": rope_pairs,
    "MTP chain": mtp_chain,
    "pre-norm block": pre_norm_block,
    "pre-norm block, dense": partial(pre_norm_block, _FOUR_HEADS),
    "bill": bill,
    "MoE layer": moe_layers,
    "MLA, absorbed": mla_absorbed,
    "MLA, expanded": mla_expanded,
    "look-up task": lookup_task,
    "balance loop": balance_loop,
    "MHA, GQA, MQA, MLA": attention_kinds,
    "MHA, GQA, MQA": partial(attention_kinds, mla=False),
    "MHA, GQA, MQA, 4 heads": partial(attention_kinds, _FOUR_HEADS, 2, mla=False),
    "RL loop": rl_loop,
    "PPO and GRPO": ppo_and_grpo,
    "sandbox": sandbox,
    "bubble": bubble,
    "DualPipe": dual,
    "DualPipeV": fold,
    "FP8 flow": fp8_flow,
    "FP8 tiles": fp8_tiles,
    "FP8 re-tiling": fp8_retile,
    "dispatch": dispatch,
    "device mesh": mesh,
    "recomputation": recompute,
    "R1 stages": r1_stages,
    "distillation": distillation,
    "ways to teach a student": distillation_ways,
    "verifier": verifier,
    "sparse attention": indexer,
    "CSA and HCA": compressed,
    "CSA entries": csa_entries,
    "indexer training": training_stages,
    "hyper-connections": hyper_connections,
    "Engram": engram,
}
