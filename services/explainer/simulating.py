"""What an explanation leads one to expect on texts that somebody made up."""

from collections.abc import Sequence

from services.common.addresses import Kind, parse
from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.budget import Ledger
from services.explainer.engine.explanations import Explanation, Method, Provenance
from services.explainer.engine.offline_simulator import OfflineSimulator
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_judge import all_of
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.token_patterns import TokenPattern
from services.explainer.scoring import JudgeChoice, is_pattern, judge_of, off_the_loop


def check_kind(component: str) -> None:
    """Raises FailedPrecondition for a head, which has no activation at a token."""
    if parse(component).kind is Kind.HEAD:
        raise FailedPrecondition(
            f"{component} is a head: what is expected of it is by pairs of tokens, not by token",
            field="id",
            reason="IS_HEAD",
        )


async def simulate(
    text: str,
    texts: Sequence[tuple[str, ...]],
    choice: JudgeChoice,
    provider: Provider | None,
    ledger: Ledger,
    *,
    seed: int,
) -> tuple[str, list[list[float] | FailureKind]]:
    """Who answered, and the expected activation, 0..10, at each token of each text.

    Raises InvalidArgument for a token pattern of a head's pairs, FailedPrecondition where the judge
    cannot read the text, and what provider and budget raise.
    """
    judge = judge_of(choice, text, provider, ledger)
    # Judges read the text alone, whatever it is about.
    explanation = Explanation("", text, Provenance(method=Method.HUMAN))
    is_offline = isinstance(judge, OfflineSimulator) and is_pattern(text)
    if is_offline and TokenPattern.parse(text).is_of_pairs:
        raise InvalidArgument("is a pattern of a head's pairs, not of tokens", field="text")

    async def answers() -> list[list[float] | FailureKind]:
        return await all_of([judge.simulate(explanation, each, seed=seed) for each in texts])

    return judge.name, await off_the_loop(answers, judge)
