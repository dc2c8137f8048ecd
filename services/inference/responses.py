"""From what the engine found to response messages."""

from collections.abc import Sequence

from tdb.inference.v1 import attribute_pb2, intervention_pb2, model_pb2, run_pb2
from tdb.type.v1 import token_pb2

from services.inference import features, manifest, tensors
from services.inference.engine import ENGINE_VERSION, tables
from services.inference.engine.asked import AttributeResult, ReadPoints, RunResult
from services.inference.engine.decomposition import View
from services.inference.engine.interventions import Receipt
from services.inference.engine.model import Model
from services.inference.engine.predictions import NextTokens, Prediction
from services.inference.engine.shelf import Served
from services.inference.engine.text import Vocabulary


def describe(model: Model, limits: model_pb2.Limits) -> model_pb2.GetModelResponse:
    architecture, facts = model.architecture, model.vocabulary.facts
    response = model_pb2.GetModelResponse(
        model=manifest.model_ref(model),
        architecture=architecture.family,
        data_type=tensors.DATA_TYPES[model.dtype],
        device=str(model.device),
        dimensions=model_pb2.Dimensions(
            layers=len(architecture.layers),
            heads=architecture.n_heads,
            key_value_heads=architecture.n_key_value_heads,
            width=architecture.width,
            head_width=architecture.head_width,
            neurons=architecture.neurons,
            vocabulary=architecture.vocabulary,
            context=architecture.context,
        ),
        limits=limits,
        supports=[
            model_pb2.Support(feature=feature, supported=supported, reason=reason)
            for feature, supported, reason in features.on(architecture)
        ],
        examples=[
            model_pb2.Example(
                title=each.title,
                prompt=each.prompt,
                target=each.target,
                distractor=each.distractor,
                accuracy=each.accuracy,
            )
            for each in model.examples
        ],
        engine_version=ENGINE_VERSION,
        dictionaries=[_dictionary(each) for each in model.shelf.served.values()],
    )
    if facts is not None:
        response.tokenizer.CopyFrom(
            model_pb2.TokenizerFacts(
                vocabulary=facts.vocabulary,
                prepends_bos=facts.prepends_bos,
                bos_id=facts.bos_id,
                eos_id=facts.eos_id,
                has_chat_template=facts.has_chat_template,
                hash=model.vocabulary.files_hash,
            )
        )
    return response


def _dictionary(served: Served) -> model_pb2.Dictionary:
    header = served.header
    message = model_pb2.Dictionary(
        id=header.id,
        weights_hash=header.provenance.weights_hash,
        uri=header.provenance.uri,
        revision=header.provenance.revision,
        format=header.provenance.format,
        site_in=str(header.site_in),
        site_out=str(header.site_out),
        latents=header.latents,
        activation=header.activation,
        warning=served.warning,
        set_name=served.set_name,
    )
    if (measured := served.measured) is not None:
        message.self_test.CopyFrom(
            model_pb2.SelfTest(
                sample=measured.sample,
                tokens=measured.tokens,
                fvu=measured.fvu,
                l0=measured.l0,
                dead=measured.dead,
                declared_fvu=header.declared.fvu,
                declared_l0=header.declared.l0,
            )
        )
    return message


def tokens(ids: Sequence[int], vocabulary: Vocabulary) -> list[token_pb2.Token]:
    return [token(each, vocabulary) for each in ids]


def fill_run(
    response: run_pb2.RunResponse,
    result: RunResult,
    read: ReadPoints,
    ids: Sequence[int],
    vocabulary: Vocabulary,
) -> None:
    response.tokens.extend(tokens(ids, vocabulary))
    response.next_tokens.extend(_next_tokens(each, vocabulary) for each in result.next_tokens)
    response.receipts.extend(receipt(each) for each in result.receipts)
    for point, readings in zip(read.lens, result.lens, strict=True):
        lens = response.logit_lens.add(point=str(point))
        lens.next_tokens.extend(_next_tokens(each, vocabulary) for each in readings)
    for point, values in zip(read.activations, result.activations, strict=True):
        response.activations.add(point=str(point), axes=point.axes, tensor=tensors.write(values))


def fill_attribution(
    response: attribute_pb2.AttributeResponse,
    result: AttributeResult,
    ids: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
) -> None:
    """`ids` has the tokens of each run."""
    table, outcomes = result.table, result.outcomes
    first = outcomes[0]
    response.objective_value = first.value
    for row in table.rows:
        message = _row(row)
        if (read := result.read_outs.get(row.node)) is not None:
            message.output_tokens.extend(scores(read.output, vocabulary))
            message.input_tokens.extend(scores(read.input, vocabulary))
            message.key_input_tokens.extend(scores(read.key_input, vocabulary))
            for position, score in read.sources:
                message.sources.add(position=position, score=score)
        response.rows.append(message)
    response.totals.CopyFrom(_totals(table.totals[0]))
    response.tokens.extend(tokens(ids[0], vocabulary))
    response.top_tokens.extend(scores(result.top_tokens[0], vocabulary))
    response.receipts.extend(receipt(each) for each in first.receipts)
    response.token_effects.extend(_effects(each, False) for each in table.token_effects[0])
    for name, value in first.remainder.items():
        response.remainder.add(node=name, direct_effect=value)
    for number, outcome in enumerate(outcomes):
        response.views.extend(_view(each, number > 0) for each in outcome.views)
    if len(outcomes) == 1:
        return
    second = outcomes[1]
    response.compare_value = second.value
    response.compare_totals.CopyFrom(_totals(table.totals[1]))
    response.compare_tokens.extend(tokens(ids[1], vocabulary))
    response.compare_top_tokens.extend(scores(result.top_tokens[1], vocabulary))
    response.compare_receipts.extend(receipt(each) for each in second.receipts)
    response.token_effects.extend(_effects(each, True) for each in table.token_effects[1])
    for left in response.remainder:
        left.compare_direct_effect = second.remainder.get(left.node, 0.0)
    for name, value in second.remainder.items():
        if name not in first.remainder:
            response.remainder.add(node=name, compare_direct_effect=value)


def token(token_id: int, vocabulary: Vocabulary) -> token_pb2.Token:
    found = vocabulary.token(token_id)
    return token_pb2.Token(id=found.id, text=found.text, raw=found.raw)


def scores(
    found: Sequence[tuple[int, float]], vocabulary: Vocabulary
) -> list[token_pb2.TokenScore]:
    return [
        token_pb2.TokenScore(token=token(token_id, vocabulary), score=score)
        for token_id, score in found
    ]


def _next_tokens(result: NextTokens, vocabulary: Vocabulary) -> run_pb2.NextTokens:
    return run_pb2.NextTokens(
        position=result.position,
        top=[_prediction(each, vocabulary) for each in result.top],
        named=[_prediction(each, vocabulary) for each in result.named],
    )


def _prediction(prediction: Prediction, vocabulary: Vocabulary) -> run_pb2.Prediction:
    return run_pb2.Prediction(
        token=token(prediction.token_id, vocabulary),
        logit=prediction.logit,
        probability=prediction.probability,
    )


def receipt(found: Receipt) -> intervention_pb2.Receipt:
    return intervention_pb2.Receipt(
        target=str(found.target),
        sites=found.sites,
        positions=found.positions,
        applied=found.applied,
        delta_norm=found.delta_norm,
        before=found.before,
        after=found.after,
    )


def _row(row: tables.NodeRow) -> attribute_pb2.NodeRow:
    message = attribute_pb2.NodeRow(node=str(row.node))
    if row.values is not None:
        message.activation = row.values.activation
        message.write_magnitude = row.values.write_magnitude
        message.direct_effect = row.values.direct_effect
        message.total_effect = row.values.total_effect
    if row.compare is not None:
        message.compare.CopyFrom(
            attribute_pb2.NodeValues(
                activation=row.compare.activation,
                write_magnitude=row.compare.write_magnitude,
                direct_effect=row.compare.direct_effect,
                total_effect=row.compare.total_effect,
            )
        )
    return message


def _totals(totals: tables.Totals) -> attribute_pb2.Totals:
    return attribute_pb2.Totals(
        listed=totals.listed, unlisted=totals.unlisted, remainder=totals.remainder
    )


def _view(view: View, compare: bool) -> attribute_pb2.ViewTotals:
    return attribute_pb2.ViewTotals(
        dictionary=view.dictionary,
        compare=compare,
        latents=view.latents,
        bias=view.bias,
        error=view.error,
        site=view.site,
    )


def _effects(effects: tables.TokenEffects, compare: bool) -> attribute_pb2.TokenEffects:
    return attribute_pb2.TokenEffects(
        kind=effects.kind,
        compare=compare,
        direct_effect=effects.direct_effect,
        total_effect=effects.total_effect,
    )
