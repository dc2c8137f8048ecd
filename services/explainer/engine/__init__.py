"""The engine: explanations of components and what they are worth. No protobuf, no grpc, no torch.

    components -> splits -> explainers -> explanations -> scorers -> scores

An explainer reads the explaining half of a component's examples, a scorer the other half. Both ask
someone: a language model behind a `Provider`, or the offline simulator, which asks nobody.
"""
