"""Malformed requests: INVALID_ARGUMENT, the field's path, what would be right; it serves on."""

import base64
import math
import struct
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2

from tests.inference.helpers import CONTEXT

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

PROMPT = {"text": "When Mary and John went to the store, John gave a drink to"}
RUN: dict[str, Any] = {"prompt": PROMPT}
OBJECTIVE: dict[str, Any] = {
    "logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"text": " John"}]}
}


def edited(*interventions: dict[str, Any]) -> dict[str, Any]:
    return {"run": {**RUN, "interventions": list(interventions)}}


def objective(**more: Any) -> dict[str, Any]:
    return {"objective": {**OBJECTIVE, **more}}


def targets(*refs: dict[str, Any]) -> dict[str, Any]:
    return {"objective": {"logitDiff": {"targets": list(refs)}}}


def tensor(*values: float) -> dict[str, Any]:
    data = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return {"dataType": "DATA_TYPE_FLOAT32", "shape": [len(values)], "data": data}


def nested_patch(depth: int) -> dict[str, Any]:
    """A patch from a run that is patched from a run, and so on."""
    source = {**RUN, "interventions": [nested_patch(depth - 1)]} if depth > 1 else RUN
    return {"target": "neuron.0.1~1", "patch": {"source": source}}


def traced(node: str, **more: Any) -> dict[str, Any]:
    return {"objective": {"tracedNode": {"node": node, **more}}}


def through_value(**downstream: Any) -> dict[str, Any]:
    return traced("head.0.1~6-3", through="THROUGH_VALUE", downstream=downstream)


def along(point: str, **direction: Any) -> dict[str, Any]:
    return {"objective": {"along": {"point": point, "direction": direction}}}


ZERO: dict[str, Any] = {"zero": {}}
NODE = "objective.traced_node."
AT = "run.interventions[0]."

MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "generated positions": (
        edited({"target": "neuron.0.1", "positions": {"generated": {}}, **ZERO}),
        AT + "positions.generated",
        "only Generate adds some",
    ),
    "no run": ({"run": None}, "run", "a prompt is required"),
    "no prompt": ({"run": {}}, "run.prompt", "a prompt is required"),
    "no source": ({"run": {"prompt": {}}}, "run.prompt.source", "one of text, token_ids or chat"),
    "empty text": ({"run": {"prompt": {"text": ""}}}, "run.prompt.text", "prompt is empty"),
    "empty text with bos": (
        {"run": {"prompt": {"text": "", "prependBos": True}}},
        "run.prompt.text",
        "prompt is empty",
    ),
    "no token ids": (
        {"run": {"prompt": {"tokenIds": {}}}},
        "run.prompt.token_ids",
        "prompt is empty",
    ),
    "bos with token ids": (
        {"run": {"prompt": {"tokenIds": {"ids": [1]}, "prependBos": True}}},
        "run.prompt.prepend_bos",
        "prepend_bos is for text",
    ),
    "too long a prompt": (
        {"run": {"prompt": {"tokenIds": {"ids": [1] * (CONTEXT + 1)}}}},
        "run.prompt.token_ids",
        f"the prompt has {CONTEXT + 1} tokens; this model reads at most {CONTEXT}",
    ),
    "unknown token id": (
        {"run": {"prompt": {"tokenIds": {"ids": [1, 400]}}}},
        "run.prompt.token_ids.ids[1]",
        "token id 400 does not exist; valid is 0..399",
    ),
    "negative token id": (
        {"run": {"prompt": {"tokenIds": {"ids": [-1]}}}},
        "run.prompt.token_ids.ids[0]",
        "valid is 0..399",
    ),
    "empty chat": (
        {"run": {"prompt": {"chat": {}}}},
        "run.prompt.chat.messages",
        "at least one message is required",
    ),
    "no objective": ({"objective": None}, "objective", "an objective is required"),
    "no kind of objective": ({"objective": {}}, "objective.kind", "kind of objective is required"),
    "no target": ({"objective": {"logitDiff": {}}}, "objective.logit_diff.targets", "at least one"),
    "two-token target": (
        targets({"text": " Mary John"}),
        "objective.logit_diff.targets[0].text",
        "' Mary John' is 2 tokens, not one: ' Mary' | ' John'",
    ),
    "target that lacks its space": (
        targets({"text": "gave"}),
        "objective.logit_diff.targets[0].text",
        "' gave', with a leading space, is one token",
    ),
    "unknown target id": (
        targets({"id": 100_000}),
        "objective.logit_diff.targets[0].id",
        "valid is 0..399",
    ),
    "empty target": (targets({}), "objective.logit_diff.targets[0].ref", "by text or by id"),
    "target twice": (
        targets({"text": " Mary"}, {"text": " Mary"}),
        "objective.logit_diff.targets[1]",
        "listed twice",
    ),
    "distractor is the target": (
        {
            "objective": {
                "logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"text": " Mary"}]}
            }
        },
        "objective.logit_diff.distractors[0]",
        "is a target too",
    ),
    "position out of range": (objective(position=99), "objective.position", "valid is 0.."),
    "negative position": (objective(position=-1), "objective.position", "valid is 0.."),
    "along no point": (along("", vector=tensor(*[1.0] * 16)), "objective.along.point", "required"),
    "along a sublayer": (
        along("mlp.1", vector=tensor(*[1.0] * 16)),
        "objective.along.point",
        "no point of the residual stream; name embed, resid_mid.L, resid_post.L or final_norm",
    ),
    "along a node": (
        along("resid_post.1~3", vector=tensor(*[1.0] * 16)),
        "objective.along.point",
        "the objective's position says the token; write resid_post.1",
    ),
    "along a layer too many": (
        along("resid_mid.2", vector=tensor(*[1.0] * 16)),
        "objective.along.point",
        "valid is 0..1",
    ),
    "along no direction": (
        {"objective": {"along": {"point": "embed"}}},
        "objective.along.direction",
        "a direction is required",
    ),
    "along an empty direction": (along("embed"), "objective.along.direction.of", "one of vector"),
    "along a direction of another width": (
        along("final_norm", vector=tensor(1.0, 2.0)),
        "objective.along.direction",
        "has width 16, the direction has shape [2]",
    ),
    "no traced node": (traced(""), NODE + "node", "an address is required"),
    "traced neuron without a token": (
        traced("neuron.1.3"),
        NODE + "node",
        "name one, for example neuron.1.3~0",
    ),
    "traced row": (
        traced("head.1.1~4", through="THROUGH_QUERY"),
        NODE + "node",
        "no single score: a query reads many keys; name one pair, for example head.1.1~4-4",
    ),
    "traced head": (traced("head.1.1", through="THROUGH_KEY"), NODE + "node", "name one pair"),
    "traced masked pair": (
        traced("head.1.1~2-5", through="THROUGH_KEY"),
        NODE + "node",
        "the key must be in 0..2",
    ),
    "traced head out of range": (
        traced("head.1.2~5-2", through="THROUGH_KEY"),
        NODE + "node",
        "head 2 does not exist; valid is 0..1",
    ),
    "traced neuron out of range": (traced("neuron.0.64~2"), NODE + "node", "valid is 0..63"),
    "traced token out of range": (traced("neuron.0.3~31"), NODE + "node", "31 does not exist"),
    "traced latent of no dictionary": (traced("latent.mine.3~1"), NODE + "node", "'mine'"),
    "traced sublayer": (traced("mlp.1~3"), NODE + "node", "no value that can be traced"),
    "position with a traced node": (
        {"objective": {"tracedNode": {"node": "neuron.0.3~2"}, "position": 2}},
        "objective.position",
        "names its own token",
    ),
    "head through nothing": (
        traced("head.1.1~4-2"),
        NODE + "through",
        "THROUGH_QUERY, THROUGH_KEY, THROUGH_QUERY_KEY or THROUGH_VALUE",
    ),
    "head through a gate": (
        traced("head.1.1~4-2", through="THROUGH_GATE"),
        NODE + "through",
        "not THROUGH_GATE",
    ),
    "neuron through a query": (
        traced("neuron.0.3~2", through="THROUGH_QUERY"),
        NODE + "through",
        "THROUGH_QUERY is for heads",
    ),
    "ungated neuron through its gate": (
        traced("neuron.0.3~2", through="THROUGH_GATE"),
        NODE + "through",
        "is not gated",
    ),
    "ungated neuron through up": (
        traced("neuron.0.3~2", through="THROUGH_UP"),
        NODE + "through",
        "is not gated",
    ),
    "unknown through": (traced("head.1.1~4-2", through=17), NODE + "through", "does not define"),
    "unknown side": (
        traced("neuron.0.3~2", side=9),
        NODE + "side",
        "ActivationSide does not define",
    ),
    "side of a value": (
        traced("head.0.1~6-3", through="THROUGH_VALUE", side=2, downstream=OBJECTIVE),
        NODE + "side",
        "leave side unset",
    ),
    "value without downstream": (
        traced("head.0.1~6-3", through="THROUGH_VALUE"),
        NODE + "downstream",
        "measures the pair's write on another objective",
    ),
    "downstream of a query": (
        traced("head.0.1~6-3", through="THROUGH_QUERY", downstream=OBJECTIVE),
        NODE + "downstream",
        "THROUGH_VALUE only",
    ),
    "downstream of a neuron": (
        traced("neuron.0.3~2", downstream=OBJECTIVE),
        NODE + "downstream",
        "THROUGH_VALUE only",
    ),
    "downstream without a kind": (through_value(), NODE + "downstream.kind", "is required"),
    "downstream through a value": (
        through_value(tracedNode={"node": "head.1.1~7-2", "through": "THROUGH_VALUE"}),
        NODE + "downstream.traced_node.through",
        "cannot itself be traced through a value",
    ),
    "position of a traced downstream": (
        through_value(tracedNode={"node": "neuron.0.3~6"}, position=6),
        NODE + "downstream.position",
        "names its own token",
    ),
    "downstream that does not exist": (
        through_value(tracedNode={"node": "neuron.5.3~6"}),
        NODE + "downstream.traced_node.node",
        "layer 5 does not exist",
    ),
    "position of a plain downstream": (
        through_value(**OBJECTIVE, position=99),
        NODE + "downstream.position",
        "valid is 0..",
    ),
    "top_k 0": ({"topK": 0}, "top_k", "top_k is 0; valid is 1..100000"),
    "top_k too large": ({"topK": 100_001}, "top_k", "valid is 1..100000"),
    "read-outs of no tokens": ({"readOuts": {}}, "read_outs.tokens", "valid is 1..100"),
    "read-outs of too many rows": (
        {"readOuts": {"tokens": 3}, "topK": 1001},
        "read_outs",
        "at most 1000 rows",
    ),
    "unknown norm mode": ({"normMode": 9}, "norm_mode", "NormMode does not define"),
    "unknown column": ({"rankBy": 77}, "rank_by", "Column does not define"),
    "compare objective alone": ({"compareObjective": OBJECTIVE}, "compare_objective", "not set"),
    "compare without prompt": ({"compare": {}}, "compare.prompt", "a prompt is required"),
    "no operation": (edited({"target": "neuron.0.1"}), AT + "op", "an operation is required"),
    "no target address": (edited(ZERO), AT + "target", "an address is required"),
    "not an address": (edited({"target": "neuron.1", **ZERO}), AT + "target", "not an address"),
    "k > q": (
        edited({"target": "head.0.1~2-5", **ZERO}),
        AT + "target",
        "the key must be in 0..2",
    ),
    "layer out of range": (
        edited({"target": "head.2.0~1", **ZERO}),
        AT + "target",
        "layer 2 does not exist; valid is 0..1",
    ),
    "head out of range": (edited({"target": "head.1.2", **ZERO}), AT + "target", "valid is 0..1"),
    "neuron out of range": (
        edited({"target": "neuron.1.64~0", **ZERO}),
        AT + "target",
        "neuron 64 does not exist; valid is 0..63",
    ),
    "token out of range": (
        edited({"target": "neuron.1.3~31", **ZERO}),
        AT + "target",
        "token position 31 does not exist",
    ),
    "unknown dictionary": (
        edited({"target": "latent.mine.3", **ZERO}),
        AT + "target",
        "no dictionary 'mine' is loaded",
    ),
    "NaN": (edited({"target": "neuron.1.3", "set": {"value": "NaN"}}), AT + "set.value", "nan"),
    "infinity": (
        edited({"target": "neuron.1.3", "set": {"value": "Infinity"}}),
        AT + "set.value",
        "finite",
    ),
    "set without a value": (
        edited({"target": "neuron.1.3", "set": {}}),
        AT + "set.to",
        "a value is required",
    ),
    "a head set to a number": (
        edited({"target": "head.1.1~3", "set": {"value": 1}}),
        AT + "set.value",
        "its value is a vector of width 8",
    ),
    "a vector for a scalar": (
        edited({"target": "neuron.1.3", "set": {"vector": tensor(0.5)}}),
        AT + "set.vector",
        "its value is one number",
    ),
    "a vector of the wrong width": (
        edited({"target": "attn.1", "set": {"vector": tensor(0.5, 1.0)}}),
        AT + "set.vector",
        "its value has width 16, the vector has shape [2]",
    ),
    "a vector without a data type": (
        edited({"target": "attn.1", "set": {"vector": {"shape": [1], "data": ""}}}),
        AT + "set.vector.data_type",
        "FLOAT32",
    ),
    "a vector of two axes": (
        edited({"target": "attn.1", "set": {"vector": {**tensor(1.0), "shape": [1, 1]}}}),
        AT + "set.vector.shape",
        "a vector has one axis",
    ),
    "a vector that lacks bytes": (
        edited({"target": "attn.1", "set": {"vector": {**tensor(1.0), "shape": [16]}}}),
        AT + "set.vector.data",
        "needs 64 bytes, there are 4",
    ),
    "NaN in a vector": (
        edited({"target": "attn.1", "add": {"direction": {"vector": tensor(*[math.nan] * 16)}}}),
        AT + "add.direction.vector.data",
        "every value must be finite",
    ),
    "infinite factor": (
        edited({"target": "neuron.1.3", "scale": {"factor": "-Infinity"}}),
        AT + "scale.factor",
        "finite",
    ),
    "nothing to add": (
        edited({"target": "neuron.1.3", "add": {}}),
        AT + "add.addend",
        "one of value or direction",
    ),
    "strength of a number": (
        edited({"target": "neuron.1.3", "add": {"value": 1, "strength": 2}}),
        AT + "add.strength",
        "strength multiplies a direction",
    ),
    "no reference prompts": (
        edited({"target": "neuron.1.3", "mean": {}}),
        AT + "mean.prompts",
        "0 reference prompts are given; valid is 1..64",
    ),
    "too many reference prompts": (
        edited({"target": "neuron.1.3", "mean": {"prompts": [PROMPT] * 65}}),
        AT + "mean.prompts",
        "65 reference prompts",
    ),
    "an empty reference prompt": (
        edited({"target": "neuron.1.3", "mean": {"prompts": [PROMPT, {"text": ""}]}}),
        AT + "mean.prompts[1].text",
        "prompt is empty",
    ),
    "the mean of a pair": (
        edited({"target": "head.1.0~3-1", "mean": {"prompts": [PROMPT]}}),
        AT + "mean.per_position",
        "at its own positions only",
    ),
    "a mean per position over unequal prompts": (
        edited(
            {
                "target": "neuron.1.3",
                "mean": {"prompts": [PROMPT, {"text": " Mary"}], "perPosition": True},
            }
        ),
        AT + "mean.prompts",
        "prompts of one token count",
    ),
    "no run to patch from": (
        edited({"target": "neuron.1.3", "patch": {}}),
        AT + "patch.source",
        "the run to patch from is required",
    ),
    "no prompt to patch from": (
        edited({"target": "neuron.1.3", "patch": {"source": {}}}),
        AT + "patch.source.prompt",
        "a prompt is required",
    ),
    "a shorter prompt to patch from": (
        edited({"target": "neuron.1.3", "patch": {"source": {"prompt": {"text": " Mary"}}}}),
        AT + "patch.alignment",
        "and the source 1; say which of its tokens stands for which",
    ),
    "an edited position that is not aligned": (
        edited(
            {
                "target": "neuron.1.3",
                "patch": {"source": RUN, "alignment": [{"to": 1, "source": 2}]},
            }
        ),
        AT + "patch.alignment",
        "position 0 stands for no token of the source",
    ),
    "an alignment out of range": (
        edited(
            {
                "target": "neuron.1.3~1",
                "patch": {"source": RUN, "alignment": [{"to": 1, "source": -2}]},
            }
        ),
        AT + "patch.alignment[0].source",
        "position -2 does not exist",
    ),
    "a bad edit of the run to patch from": (
        edited(
            {
                "target": "neuron.1.3",
                "patch": {
                    "source": {**RUN, "interventions": [{"target": "head.7.0", **ZERO}]},
                },
            }
        ),
        AT + "patch.source.interventions[0].target",
        "layer 7 does not exist",
    ),
    "patches five deep": (
        edited(nested_patch(5)),
        AT + 4 * "patch.source.interventions[0]." + "patch.source",
        "nested more than 4 deep",
    ),
    "more reference tokens than are read": (
        edited(
            *(
                {
                    "target": f"neuron.1.{number}",
                    "mean": {
                        "prompts": [
                            {"tokenIds": {"ids": [number, prompt] + [1] * (CONTEXT - 2)}}
                            for prompt in range(64)
                        ]
                    },
                }
                for number in range(9)
            )
        ),
        "run.interventions[8].mean.prompts[0]",
        "more than 16384 tokens together",
    ),
    "a patched value that is set too": (
        edited(
            {"target": "neuron.1.3~2", "patch": {"source": RUN}},
            {"target": "neuron.1.3", "mean": {"prompts": [PROMPT]}},
        ),
        "run.interventions[1].target",
        "already set by interventions[0]",
    ),
    "a bias set": (
        edited({"target": "bias.attn.0", "set": {"vector": tensor(*[1.0] * 16)}}),
        AT + "set",
        "bias.attn.0 is the attention's output bias, which set does not fit; what fits: zero or",
    ),
    "relative to a number": (
        edited({"target": "neuron.1.3", "add": {"value": 1, "relative": True}}),
        AT + "add.relative",
        "relative scales a direction",
    ),
    "unit where only the direction counts": (
        edited(
            {
                "target": "mlp.1",
                "add": {"direction": {"writeOf": "neuron.0.1", "unit": True}, "relative": True},
            }
        ),
        AT + "add.direction.unit",
        "unit means nothing",
    ),
    "a direction projected out of a neuron": (
        edited({"target": "neuron.1.3", "projectOut": {"direction": {"vector": tensor(1.0)}}}),
        AT + "project_out",
        "what fits: zero, set, scale, add, mean or patch; project_out fits vectors",
    ),
    "a direction projected out of a pair": (
        edited({"target": "head.1.0~3-1", "projectOut": {"direction": {"vector": tensor(1.0)}}}),
        AT + "project_out",
        "what fits: zero, set, scale, add, mean, patch or mask",
    ),
    "nothing projected out": (
        edited({"target": "mlp.1", "projectOut": {}}),
        AT + "project_out.direction",
        "a direction is required",
    ),
    "a projected direction of the wrong width": (
        edited({"target": "head.1.0", "projectOut": {"direction": {"writeOf": "neuron.0.1"}}}),
        AT + "project_out.direction",
        "its value has width 8, the vector has shape [16]",
    ),
    "a masked head": (
        edited({"target": "head.1.0", "mask": {}}),
        AT + "mask",
        "mask fits a pair, for example head.1.0~0-0",
    ),
    "a masked neuron": (edited({"target": "neuron.1.3", "mask": {}}), AT + "mask", "what fits"),
    "the last visible pair masked": (
        edited({"target": "head.1.0~1-1", "mask": {}}, {"target": "head.1.0~1-0", "mask": {}}),
        "run.interventions[1].target",
        "the row has nothing to attend to",
    ),
    "a pair masked twice": (
        edited({"target": "head.1.0~2-1", "mask": {}}, {"target": "head.1.0~2-1", "mask": {}}),
        "run.interventions[1].target",
        "already masked by interventions[0]",
    ),
    "a number added to a sublayer": (
        edited({"target": "mlp.1", "add": {"value": 1}}),
        AT + "add.value",
        "its value is a vector of width 16",
    ),
    "no direction": (
        edited({"target": "mlp.1", "add": {"direction": {}}}),
        AT + "add.direction.of",
        "one of vector, write_of or unembedding",
    ),
    "direction of length 0": (
        edited({"target": "mlp.1", "add": {"direction": {"vector": tensor(*[0.0] * 16)}}}),
        AT + "add.direction",
        "length 0",
    ),
    "write of a head": (
        edited({"target": "mlp.1", "add": {"direction": {"writeOf": "head.0.1"}}}),
        AT + "add.direction.write_of",
        "writes no single direction",
    ),
    "unembedding of nothing": (
        edited({"target": "mlp.1", "add": {"direction": {"unembedding": {}}}}),
        AT + "add.direction.unembedding.targets",
        "at least one target",
    ),
    "no target of log_prob": (
        {"objective": {"logProb": {}}},
        "objective.log_prob.targets",
        "at least one target",
    ),
    "two-token target of prob": (
        {"objective": {"prob": {"targets": [{"text": " Mary John"}]}}},
        "objective.prob.targets[0].text",
        "is 2 tokens",
    ),
    "a sublayer set twice": (
        edited({"target": "resid_pre.1~2", **ZERO}, {"target": "resid_post.0", **ZERO}),
        "run.interventions[1].target",
        "already set by interventions[0]",
    ),
    "positions with a node": (
        edited({"target": "neuron.1.3~2", "positions": {"all": {}}, **ZERO}),
        AT + "positions",
        "names its own position",
    ),
    "positions unset": (
        edited({"target": "neuron.1.3", "positions": {}, **ZERO}),
        AT + "positions.which",
        "one of all, list, start or generated",
    ),
    "empty position list": (
        edited({"target": "neuron.1.3", "positions": {"list": {}}, **ZERO}),
        AT + "positions.list.positions",
        "at least one position",
    ),
    "listed position out of range": (
        edited({"target": "neuron.1.3", "positions": {"list": {"positions": [1, 40]}}, **ZERO}),
        AT + "positions.list.positions[1]",
        "position 40 does not exist",
    ),
    "position listed twice": (
        edited({"target": "neuron.1.3", "positions": {"list": {"positions": [1, 1]}}, **ZERO}),
        AT + "positions.list.positions[1]",
        "listed twice",
    ),
    "start out of range": (
        edited({"target": "neuron.1.3", "positions": {"start": 50}, **ZERO}),
        AT + "positions.start",
        "position 50 does not exist",
    ),
    "the same scalar twice": (
        edited({"target": "neuron.1.3~2", **ZERO}, {"target": "neuron.1.3", "set": {"value": 1}}),
        "run.interventions[1].target",
        "already set by interventions[0]",
    ),
    "a pair and its row": (
        edited({"target": "head.1.0~3-1", **ZERO}, {"target": "head.1.0~3", **ZERO}),
        "run.interventions[1].target",
        "already set by interventions[0]",
    ),
    "a row and its pair": (
        edited({"target": "head.1.0", **ZERO}, {"target": "head.1.0~3-1", **ZERO}),
        "run.interventions[1].target",
        "already set by interventions[0]",
    ),
}

MALFORMED |= {
    "no integrated steps": (
        {"integratedSteps": 0},
        "integrated_steps",
        "integrated_steps is 0; valid is 1..256",
    ),
    "too many integrated steps": (
        {"integratedSteps": 257},
        "integrated_steps",
        "integrated_steps is 257; valid is 1..256",
    ),
    "too many rows to verify": (
        {"verify": True, "topK": 1001},
        "verify",
        "at most 1000 rows are verified; top_k is 1001",
    ),
    "too many sources": (
        {"readOuts": {"tokens": 3, "sources": 101}},
        "read_outs.sources",
        "101 sources are asked for; valid is 0..100",
    ),
    "fewer sources than none": (
        {"readOuts": {"tokens": 3, "sources": -1}},
        "read_outs.sources",
        "valid is 0..100",
    ),
    "unknown dictionary in the table": (
        {"dictionaries": ["x"]},
        "dictionaries[0]",
        "no dictionary or set 'x' is served with this model; served: none",
    ),
}


def build(change: dict[str, Any]) -> attribute_pb2.AttributeRequest:
    merged = {"run": RUN, "objective": OBJECTIVE, **change}
    kept = {name: value for name, value in merged.items() if value is not None}
    return ParseDict(kept, attribute_pb2.AttributeRequest())


async def refusal(stub: "Stub", request: attribute_pb2.AttributeRequest) -> tuple[Any, str, str]:
    """(status code, field path, message) of a call that must be refused."""
    return await refusal_of(stub.Attribute(request))


async def refusal_of(call: Awaitable[Any]) -> tuple[Any, str, str]:
    """The same of any call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
    path = bad.field_violations[0].field if bad.field_violations else ""
    return caught.value.code(), path, caught.value.details() or ""


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_say_where_and_what(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    code, field, message = await refusal(stub, build(change))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message
    assert (await stub.Attribute(build({}))).rows  # the server keeps serving


async def test_an_unknown_field_in_binary_is_refused(stub: "Stub") -> None:
    request = build({})
    request.run.MergeFromString(b"\xaa\x06\x01x")  # field 101, a string
    code, field, message = await refusal(stub, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == "run"
    assert "no field number 101" in message


async def test_run_refuses_the_same_way(stub: "Stub") -> None:
    request = ParseDict({"run": RUN, "positions": {"start": 99}}, run_pb2.RunRequest())
    with pytest.raises(grpc.aio.AioRpcError, match="position 99 does not exist") as caught:
        await stub.Run(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tokenize_needs_a_prompt(stub: "Stub") -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="a prompt is required") as caught:
        await stub.Tokenize(model_pb2.TokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_chat_without_a_template_is_a_failed_precondition(stub: "Stub") -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    code, field, message = await refusal(stub, build({"run": {"prompt": {"chat": chat}}}))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert field == "run.prompt.chat"
    assert "no chat template" in message
