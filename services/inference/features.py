"""What this version can do on a model, and why not where it cannot: the list of GetModel."""

from collections.abc import Iterator

from services.inference.engine.architecture import Architecture

BUILT = (
    "objective.logit_diff",
    "objective.logit_minus_mean",
    "objective.log_prob",
    "objective.prob",
    "objective.along",
    "objective.traced_node",
    "objective.traced_node.latent",
    "intervention.zero",
    "intervention.set",
    "intervention.scale",
    "intervention.add",
    "intervention.add.relative",
    "intervention.mean",
    "intervention.patch",
    "intervention.project_out",
    "intervention.mask",
    "target.neuron",
    "target.head",
    "target.head_pair",
    "target.head_vector",
    "target.sublayer",
    "target.residual",
    "target.latent",
    "target.resid_mid",
    "target.bias",
    "attribute.compare",
    "attribute.dictionaries",
    "attribute.norm_modes",
    "attribute.read_outs",
    "attribute.read_outs.sources",
    "run.logit_lens",
    "run.activations",
    "attribute.verify",
    "attribute.integrated_steps",
    "attribute.integrated_path",
    "attribute.baseline",
    "verify",
    "stream_activations",
    "harvest",
    "generate",
    "positions.generated",
    "describe_component",
    "stream_output_tokens",
)


def on(architecture: Architecture) -> Iterator[tuple[str, bool, str]]:
    """Every feature: whether it works on a model, and where or why not."""
    limits = _limits(architecture)
    for feature in BUILT:
        yield feature, *limits.get(feature, (True, ""))


def _limits(architecture: Architecture) -> dict[str, tuple[bool, str]]:
    limits: dict[str, tuple[bool, str]] = {}
    if architecture.experts:
        layers = ", ".join(map(str, sorted(architecture.experts)))
        limits["target.neuron"] = (
            bool(architecture.neurons),
            f"the MLPs of layers {layers} are mixtures of experts, which have no neurons; mlp.L is "
            "the finest node there",
        )
    if architecture.parallel:
        limits["target.resid_mid"] = (
            False,
            "attention and MLP of a layer read the same residual stream, so there is none between",
        )
    return limits
