"""What this version can do, and what it cannot do yet: one list for GetModel and for refusals."""

from services.common.errors import Unimplemented

BUILT = (
    "objective.logit_diff",
    "objective.logit_minus_mean",
    "objective.log_prob",
    "objective.prob",
    "intervention.zero",
    "intervention.set",
    "intervention.scale",
    "intervention.add",
    "intervention.add.relative",
    "intervention.project_out",
    "intervention.mask",
    "target.neuron",
    "target.head",
    "target.head_pair",
    "target.head_vector",
    "target.sublayer",
    "target.residual",
    "attribute.compare",
    "attribute.norm_modes",
    "attribute.read_outs",
    "run.logit_lens",
    "run.activations",
    "attribute.verify",
    "attribute.integrated_steps",
    "verify",
    "stream_activations",
    "generate",
    "positions.generated",
    "describe_component",
)

NOT_BUILT = {
    "objective.along": "the objective along",
    "objective.traced_node": "tracing a node",
    "intervention.mean": "the operation mean",
    "intervention.patch": "the operation patch",
    "attribute.dictionaries": "dictionaries",
    "attribute.integrated_steps.latents": "the integrated-gradients column of latents",
    "attribute.baseline": "a baseline",
    "attribute.integrated_path": "the integrated-gradients column",
    "attribute.read_outs.sources": "the sources of attention latents",
    "describe_component.latents": "describing latents",
}


def not_built(feature: str, field: str) -> Unimplemented:
    """The refusal of a feature of `NOT_BUILT`, naming the field that asked for it."""
    return Unimplemented(f"{NOT_BUILT[feature]} is not built in this version", field=field)
